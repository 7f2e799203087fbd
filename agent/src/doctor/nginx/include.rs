//! The file with bans that Nginx includes: can the agent write it, does Nginx read it where it keeps somebody out, and does
//! Nginx take its configuration?

use std::{path::Path, time::Duration};

use super::{
    super::{Check, Plan, place},
    Seen,
    conf::Directive,
    seen,
};
use crate::enforce::nginx::{self, Form, Settings};

/// The test of Nginx's configuration may take no longer here, whatever the agent would grant it.
const LIMIT: Duration = Duration::from_secs(10);

pub(in super::super) fn checks(plan: &Plan) -> Vec<Check> {
    let Some(settings) = &plan.config.nginx else {
        return Vec::new();
    };
    let seen = seen(plan);
    let is_running = seen.iter().any(|(instance, read)| {
        instance.pid.is_some() && read.as_ref().is_ok_and(|(root, _)| has_include(root))
    });
    vec![
        file(settings),
        reached(settings, &seen),
        tested(plan, settings, is_running),
    ]
}

/// Can the agent write it, and may it?
fn file(settings: &Settings) -> Check {
    let name = "Nginx include";
    let path = &settings.include;
    let shown = path.display();
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.is_dir() {
        return Check::fail(
            name,
            format!("{} is no folder", folder.display()),
            format!(
                "`mkdir -p {}`, or correct enforce.nginx.include",
                folder.display()
            ),
        );
    }
    if let Some((found, remedy)) = place::unwritable(folder) {
        return Check::fail(name, found, remedy);
    }
    match nginx::is_there(settings) {
        Err(problem) => Check::fail(
            name,
            format!("{problem:#}"),
            "correct enforce.nginx.include: the file is the agent's alone",
        ),
        Ok(true) => Check::pass(name, format!("{shown} is the agent's, and can be written")),
        Ok(false) => Check::pass(name, format!("{shown} can be made")),
    }
}

/// What is to stand in Nginx's configuration.
fn lines(settings: &Settings) -> String {
    let path = settings.include.display();
    match settings.form {
        Form::Deny => format!("in http {{ }}: include {path};"),
        Form::Geo => format!(
            "in http {{ }}: geo $banned {{ default 0; include {path}; }} and in each server: if ($banned) {{ return 403; }}"
        ),
    }
}

/// Does an Nginx include it where its lines mean something, and to any effect?
fn reached(settings: &Settings, seen: &[Seen]) -> Check {
    let name = "Nginx include, read";
    let readable: Vec<&Directive> = seen
        .iter()
        .filter_map(|(_, read)| Some(&read.as_ref().ok()?.0))
        .collect();
    if readable.is_empty() {
        return Check::skipped(
            name,
            "no configuration of Nginx can be read here: whether it includes the file was not looked at",
        );
    }
    let mut found = Vec::new();
    for root in &readable {
        for http in root.all("http") {
            includes(http, &mut found);
        }
    }
    let Some((_, place)) = found.first() else {
        return Check::warn(
            name,
            format!(
                "no configuration that can be seen includes {} in http {{ }}: bans in it keep nobody out",
                settings.include.display()
            ),
            lines(settings),
        );
    };
    let is_right = |block: &Directive| match settings.form {
        Form::Deny => matches!(
            block.name.as_str(),
            "http" | "server" | "location" | "limit_except"
        ),
        Form::Geo => block.name == "geo",
    };
    let form = match settings.form {
        Form::Deny => "deny",
        Form::Geo => "geo",
    };
    let Some((block, place)) = found.iter().find(|(block, _)| is_right(block)) else {
        return Check::warn(
            name,
            format!(
                "it is included at {place}, where lines of enforce.nginx.form = {form:?} do not belong"
            ),
            lines(settings),
        );
    };
    let hole = match settings.form {
        Form::Geo => unused(&readable, block).map(|hole| (hole, lines(settings))),
        Form::Deny => open(&readable).map(|hole| {
            let remedy = "include it there, too, before any `allow all`, or take enforce.nginx.form = \"geo\" (README.md)";
            (hole, remedy.to_owned())
        }),
    };
    match hole {
        None => Check::pass(name, format!("included at {place}")),
        Some((hole, remedy)) => {
            Check::warn(name, format!("included at {place}, but {hole}"), remedy)
        }
    }
}

/// Where it is included: the blocks, and the places. Of all includes only that of our file is left in a configuration.
fn includes<'a>(block: &'a Directive, found: &mut Vec<(&'a Directive, &'a str)>) {
    for directive in &block.block {
        if directive.name == "include" {
            found.push((block, &directive.place));
        }
        includes(directive, found);
    }
}

/// Why a `geo` block does nothing.
fn unused(roots: &[&Directive], geo: &Directive) -> Option<String> {
    let variable = geo.args.last()?;
    let is_used = roots.iter().any(|root| uses(root, variable));
    (!is_used).then(|| format!("nothing uses {variable}"))
}

fn uses(block: &Directive, variable: &str) -> bool {
    block.block.iter().any(|directive| {
        let named = || directive.args.iter().any(|arg| arg.contains(variable));
        directive.name != "geo" && (named() || uses(directive, variable))
    })
}

/// Where `deny` lines of the file do not hold.
fn open(roots: &[&Directive]) -> Option<String> {
    let mut places = Vec::new();
    let including = roots
        .iter()
        .flat_map(|root| root.all("http"))
        .filter(|http| has_include(http));
    for http in including {
        find_open(http, false, &mut places);
    }
    let (first, more) = places.split_first()?;
    let more = match more.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!("it does not hold in {first}{more}"))
}

fn has_include(block: &Directive) -> bool {
    block.name == "include" || block.block.iter().any(has_include)
}

/// Goes through a block as Nginx's access module does: rules of a block's own take the place of inherited ones.
fn find_open(block: &Directive, inherited: bool, places: &mut Vec<String>) {
    let mut own = block
        .block
        .iter()
        .filter(|directive| matches!(directive.name.as_str(), "allow" | "deny"))
        .peekable();
    let has_rules = own.peek().is_some();
    // Who is not named there is kept out anyway.
    let is_shut = own.any(|rule| rule.name == "deny" && rule.args == ["all"]);
    // The first rule that matches counts.
    let before = || block.block.iter().take_while(|rule| rule.name != "include");
    let includes = block.all("include").next().is_some();
    let is_late = includes && before().any(|rule| rule.name == "allow" && rule.args == ["all"]);
    let holds = (includes && !is_late) || (inherited && !has_rules) || is_shut;
    let is_open = is_late
        || match block.name.as_str() {
            "server" => !holds && !has_include(block),
            "location" | "limit_except" => !holds && inherited,
            _ => false,
        };
    if is_open {
        places.push(format!("the {} at {}", block.name, block.place));
    }
    for inner in &block.block {
        if matches!(
            inner.name.as_str(),
            "server" | "location" | "if" | "limit_except"
        ) {
            find_open(inner, holds, places);
        }
    }
}

/// Would Nginx take its configuration?
fn tested(plan: &Plan, settings: &Settings, is_running: bool) -> Check {
    let name = "Nginx test";
    let command = settings.test.join(" ");
    // Nginx makes logs and folders that are not there even when it is only to test; one that runs has made them.
    let against = if !is_running {
        Some("no Nginx that includes the file can be seen running")
    } else if !nginx::is_there(settings).unwrap_or(false) {
        Some("the agent makes the include when it starts, and has Nginx test then")
    } else {
        None
    };
    if let Some(against) = against {
        return Check::skipped(name, format!("`{command}` was not run: {against}"));
    }
    let settings = Settings {
        timeout: settings.timeout.min(LIMIT),
        ..settings.clone()
    };
    match settings.test() {
        Ok(()) => Check::pass(
            name,
            format!("`{command}` is content with the configuration"),
        ),
        Err(problem) => Check::bad(
            plan.harm,
            name,
            format!("Nginx would take no ban: {problem:#}"),
            "put right what it says, or correct enforce.nginx.test; run the doctor as the user that the agent runs as",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::{
        super::{super::Outcome, Built, conf},
        *,
    };
    use crate::{config::Config, runtime::clock};

    struct Site {
        folder: tempfile::TempDir,
        settings: Settings,
    }

    impl Site {
        fn new(form: Form) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let settings = Settings::new(folder.path().join("banned.conf"), form);
            Self { folder, settings }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        /// With `OURS` for the include.
        fn reached(&self, configuration: &str) -> Check {
            let ours = self.settings.include.to_string_lossy();
            let path = self.path("nginx.conf");
            fs::write(&path, configuration.replace("OURS", &ours)).unwrap();
            let read = conf::read(Path::new("/"), &path, Some(&self.settings.include));
            let instance = Built::default().instance(Some(7), "/".into(), &[]);
            reached(&self.settings, &[(instance, read)])
        }

        fn tested(&self, mode: &str, script: &str, is_running: bool) -> Check {
            let settings = Settings {
                test: ["sh", "-c", script].map(str::to_owned).to_vec(),
                timeout: Duration::from_millis(500),
                ..self.settings.clone()
            };
            let plan = Plan::new(&Config::parse(&format!("mode = '{mode}'")).unwrap());
            tested(&plan, &settings, is_running)
        }
    }

    #[test]
    fn without_an_include_nothing_is_looked_at() {
        assert_eq!(checks(&Plan::new(&Config::default())), []);
        let site = Site::new(Form::Deny);
        let config = format!(
            "[enforce.nginx]\ninclude = '{}'\ntest = ['true']",
            site.settings.include.display()
        );
        let names: Vec<String> = checks(&Plan::new(&Config::parse(&config).unwrap()))
            .into_iter()
            .map(|check| check.name)
            .collect();
        assert_eq!(
            names,
            ["Nginx include", "Nginx include, read", "Nginx test"]
        );
    }

    #[test]
    fn the_file_must_be_the_agent_s_to_write() {
        let mut site = Site::new(Form::Deny);
        let own = site.settings.include.clone();
        let of = |site: &Site| (file(&site.settings).outcome, file(&site.settings).found);
        let (outcome, found) = of(&site);
        assert!(
            outcome == Outcome::Pass && found.ends_with("can be made"),
            "{found}"
        );
        fs::write(&own, "# to be filled\n").unwrap();
        assert!(of(&site).1.contains("is the agent's"));
        fs::write(&own, "allow all;\n").unwrap();
        let (outcome, found) = of(&site);
        assert!(
            outcome == Outcome::Fail && found.contains("is not a file of Portcullis"),
            "{found}"
        );
        fs::remove_file(&own).unwrap();
        fs::create_dir(&own).unwrap();
        assert_eq!(of(&site).0, Outcome::Fail);
        assert_eq!(
            fs::read_dir(site.folder.path()).unwrap().count(),
            1,
            "looking changes nothing"
        );
        site.settings.include = site.path("missing/banned.conf");
        assert!(
            file(&site.settings)
                .remedy
                .unwrap()
                .starts_with("`mkdir -p")
        );
        fs::write(site.path("missing"), "").unwrap();
        assert_eq!(of(&site).0, Outcome::Fail);
    }

    #[test]
    fn an_include_that_nginx_does_not_read_is_told_with_the_line_to_add() {
        for (form, line) in [
            (Form::Deny, "include /"),
            (Form::Geo, "geo $banned { default 0; include /"),
        ] {
            let site = Site::new(form);
            for configuration in ["http { }", "stream { include OURS; }", ""] {
                let check = site.reached(configuration);
                assert_eq!(check.outcome, Outcome::Warn, "{configuration}");
                assert!(check.remedy.unwrap().contains(line), "{form:?}");
            }
        }
        let site = Site::new(Form::Deny);
        assert_eq!(site.reached("http {").outcome, Outcome::Skipped);
        assert_eq!(reached(&site.settings, &[]).outcome, Outcome::Skipped);
    }

    #[test]
    fn each_form_has_its_place() {
        let (deny, geo) = (Site::new(Form::Deny), Site::new(Form::Geo));
        let as_deny = "http { include OURS; server { location / { } } }";
        let as_geo = "http { geo $remote_addr $banned { default 0; include OURS; } server { if ($banned) { return 403; } } }";
        assert_eq!(deny.reached(as_deny).outcome, Outcome::Pass);
        assert_eq!(geo.reached(as_geo).outcome, Outcome::Pass);
        for check in [deny.reached(as_geo), geo.reached(as_deny)] {
            assert!(
                check.outcome == Outcome::Warn && check.found.contains("do not belong"),
                "{check:?}"
            );
        }
        let unused = geo.reached("http { geo $banned { default 0; include OURS; } server { } }");
        assert!(
            unused.outcome == Outcome::Warn && unused.found.contains("nothing uses $banned"),
            "{unused:?}"
        );
    }

    #[test]
    fn where_deny_does_not_hold_is_told() {
        let site = Site::new(Form::Deny);
        for (http, holds) in [
            ("include OURS; server { allow 10.0.0.0/8; }", false),
            (
                "include OURS; server { location /a { deny 192.0.2.1; } location /b { allow all; } }",
                false,
            ),
            (
                "include OURS; server { location /a { allow 10.0.0.0/8; deny all; } }",
                true,
            ),
            (
                "include OURS; server { location /a { allow 10.0.0.0/8; include OURS; } }",
                true,
            ),
            ("server { include OURS; } server { }", false),
            ("server { location / { include OURS; } }", true),
            ("allow 10.0.0.0/8; include OURS; server { }", true),
            ("include OURS; allow all; server { }", true),
            ("allow all; include OURS; server { }", false),
            ("server { allow all; include OURS; }", false),
        ] {
            let check = site.reached(&format!("http {{ {http} }}"));
            let outcome = if holds { Outcome::Pass } else { Outcome::Warn };
            assert_eq!(check.outcome, outcome, "{http}: {check:?}");
        }
        let two = site.reached(
            "http { include OURS; server { location /a { deny 192.0.2.1; } location /b { allow all; } } }",
        );
        assert!(two.found.contains("1 more"), "{two:?}");
    }

    #[test]
    fn nginx_is_asked_only_where_that_changes_nothing() {
        let site = Site::new(Form::Deny);
        let ran = site.path("ran");
        let script = format!("touch {}", ran.display());
        assert_eq!(
            site.tested("enforce", &script, true).outcome,
            Outcome::Skipped,
            "the include is not there"
        );
        fs::write(&site.settings.include, "").unwrap();
        assert_eq!(
            site.tested("enforce", &script, false).outcome,
            Outcome::Skipped,
            "no Nginx that includes it runs"
        );
        assert!(!ran.exists());
        assert_eq!(site.tested("enforce", &script, true).outcome, Outcome::Pass);
        assert!(ran.exists());
    }

    #[test]
    fn a_test_that_fails_or_hangs_is_told() {
        let site = Site::new(Form::Deny);
        fs::write(&site.settings.include, "").unwrap();
        let failed = site.tested("enforce", "echo unknown directive >&2; exit 1", true);
        assert!(
            failed.outcome == Outcome::Fail && failed.found.contains("unknown directive"),
            "{failed:?}"
        );
        let observed = site.tested("observe", "exit 1", true);
        assert_eq!(observed.outcome, Outcome::Warn);
        let before = clock::boot();
        let hung = site.tested("enforce", "sleep 60", true);
        assert!(hung.found.contains("was killed"), "{hung:?}");
        assert!(clock::boot().saturating_sub(before) < Duration::from_secs(30));
    }
}
