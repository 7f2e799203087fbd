//! Nginx: does it write the log that the agent reads, in a form that it can read, with the address that packets have?

mod conf;
pub(super) mod include;
mod lines;
pub(super) mod syslog;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use nix::unistd::{AccessFlags, access};
use portcullis_engine::{Timestamp, parse};

use self::conf::Directive;
use super::{Check, Outcome, Plan, command};
use crate::{runtime::clock, source::follow};

const LOG_FORMAT: &str = "log_format portcullis escape=json '{\"timestamp\":\"$msec\",\"source_ip\":\"$remote_addr\",\
                          \"realip_remote_addr\":\"$realip_remote_addr\",\"method\":\"$request_method\",\"path\":\"$request_uri\",\
                          \"status\":\"$status\",\"response_size\":\"$body_bytes_sent\",\"user_agent\":\"$http_user_agent\",\
                          \"request_time\":\"$request_time\",\"request_id\":\"$request_id\"}';";

const COMBINED: &str = "$remote_addr - $remote_user [$time_local] \"$request\" $status $body_bytes_sent \"$http_referer\" \
                        \"$http_user_agent\"";
/// Logs that are looked at.
const MAX_LOGS: usize = 16;

pub(super) fn checks(plan: &Plan) -> Vec<Check> {
    let patterns = &plan.config.source.logs;
    let mut all: Vec<Check> = follow::unmatched(patterns).map(no_match).collect();
    let logs = follow::logs(patterns);
    let seen = seen(plan);
    let each = |log: &PathBuf| {
        let name = log.file_name().unwrap_or_default().to_string_lossy();
        let named = |check: Check| {
            if logs.len() > 1 {
                of(check, &name)
            } else {
                check
            }
        };
        checks_of(plan, &seen, log)
            .into_iter()
            .map(named)
            .collect::<Vec<_>>()
    };
    // A host with more logs than this has one like the others.
    all.extend(logs.iter().take(MAX_LOGS).flat_map(each));
    all
}

/// A check of one of several.
fn of(check: Check, which: &str) -> Check {
    Check {
        name: format!("{} of {which}", check.name),
        ..check
    }
}

fn no_match(pattern: &Path) -> Check {
    Check::warn(
        "log pattern",
        format!(
            "{} matches no file now: nothing is read by it until one comes",
            pattern.display()
        ),
        "correct source.log; what is packed, or is called like another match with something after it, is left out",
    )
}

/// An Nginx; and its configuration with how many files that is of, or why it cannot be read.
type Seen = (Instance, Result<(Directive, usize), String>);

/// Those that are here.
fn seen(plan: &Plan) -> Vec<Seen> {
    let own = plan.config.nginx.as_ref();
    let own = own.map(|nginx| nginx.include.as_path());
    let mut instances = running();
    instances.extend(installed());
    let read = |instance: Instance| {
        let read = conf::read(&instance.root, &instance.conf, own);
        (instance, read)
    };
    instances.into_iter().map(read).collect()
}

/// An Nginx; and the number of its files with what matters of them, or why they cannot be read.
type Chosen<'a> = (&'a Instance, Result<(usize, Site), &'a String>);

/// The Nginx that writes our log, if there are several.
fn choose<'a>(seen: &'a [Seen], is_ours: impl Fn(&Instance, &str) -> bool) -> Option<Chosen<'a>> {
    let site = |(instance, read): &'a Seen| {
        let site = |(root, files): &(Directive, usize)| {
            (*files, Site::of(root, |path| is_ours(instance, path)))
        };
        (instance, read.as_ref().map(site))
    };
    let mut all: Vec<_> = seen.iter().map(site).collect();
    let writes = |read: &Result<(usize, Site), _>| {
        read.as_ref().is_ok_and(|(_, site)| !site.ours.is_empty())
    };
    let at = all.iter().position(|(_, read)| writes(read)).unwrap_or(0);
    (!all.is_empty()).then(|| all.swap_remove(at))
}

fn checks_of(plan: &Plan, seen: &[Seen], log: &Path) -> Vec<Check> {
    let mut all = Vec::new();
    let chosen = choose(seen, |instance, path| instance.is(path, log));
    match &chosen {
        None => all.push(Check::warn(
            "Nginx",
            "neither running nor installed here",
            "start it; one in a container is seen when the doctor runs as root on the host",
        )),
        Some((instance, Err(problem))) => all.push(Check::warn(
            "Nginx",
            format!("{}: {problem}", instance.name()),
            "run as root; `nginx -t` says whether Nginx itself can read it",
        )),
        Some((instance, Ok((files, site)))) => {
            all.push(Check::pass(
                "Nginx",
                format!(
                    "{}, {} and {} more files",
                    instance.name(),
                    instance.conf.display(),
                    files.saturating_sub(1)
                ),
            ));
            all.extend(judge(plan, site, &log.to_string_lossy(), grows(log)));
        }
    }
    let pid = chosen.and_then(|(instance, ..)| instance.pid);
    let file = file(log);
    let is_readable = file.outcome == Outcome::Pass;
    all.push(file);
    if is_readable {
        all.extend(lines::checks(plan, log));
    }
    all.extend(pid.and_then(|pid| open_in(pid, log)));
    all.push(rotation(log));
    all
}

/// An Nginx.
#[derive(Clone, Debug)]
struct Instance {
    pid: Option<u32>,
    /// Its root folder: another one when it runs in a container.
    root: PathBuf,
    conf: PathBuf,
    /// What relative paths of logs go by.
    prefix: PathBuf,
}

impl Instance {
    fn name(&self) -> String {
        let place = if self.root == Path::new("/") {
            ""
        } else {
            " in a container or chroot"
        };
        self.pid.map_or("not running".to_owned(), |pid| {
            format!("running{place} (pid {pid})")
        })
    }

    /// Is a path of its configuration our log?
    fn is(&self, path: &str, log: &Path) -> bool {
        conf::is(&self.root, &self.prefix.join(path), log)
    }
}

/// What tells a file from all others, whatever it is called.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Those that run, by their master processes.
fn running() -> Vec<Instance> {
    /// Of processes, so that no host is too large.
    const MOST: usize = 100_000;
    let own = identity(Path::new("/"));
    let pids = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .take(MOST);
    let mut found = Vec::new();
    for pid in pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let Some(command) = fs::read(format!("/proc/{pid}/cmdline"))
            .ok()
            .and_then(|bytes| master(&bytes))
        else {
            continue;
        };
        // Another namespace of mounts may have the same root: systemd's PrivateTmp=.
        let its = identity(Path::new(&format!("/proc/{pid}/root/")));
        let outside = its.is_some() && its != own;
        let root = if outside {
            PathBuf::from(format!("/proc/{pid}/root"))
        } else {
            PathBuf::from("/")
        };
        let built = if outside {
            Built::default()
        } else {
            Built::ask(command.first().map_or("nginx", String::as_str))
        };
        found.push(built.instance(Some(pid), root, &command));
    }
    found
}

fn installed() -> Option<Instance> {
    command::find("nginx")?;
    Some(Built::ask("nginx").instance(None, PathBuf::from("/"), &[]))
}

/// The command line of a master process: `nginx: master process /usr/sbin/nginx -c …`, in words.
fn master(cmdline: &[u8]) -> Option<Vec<String>> {
    let text = String::from_utf8_lossy(cmdline).replace('\0', " ");
    let command = text.strip_prefix("nginx: master process ")?;
    Some(
        command
            .split_ascii_whitespace()
            .map(str::to_owned)
            .collect(),
    )
}

/// What was built into an Nginx.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Built {
    prefix: PathBuf,
    conf: PathBuf,
}

impl Default for Built {
    fn default() -> Self {
        Self {
            prefix: "/etc/nginx".into(),
            conf: "/etc/nginx/nginx.conf".into(),
        }
    }
}

impl Built {
    fn ask(program: &str) -> Self {
        let program = if Path::new(program).is_absolute() {
            program
        } else {
            "nginx"
        };
        command::run(program, &["-V"]).map_or_else(|_| Self::default(), |said| Self::of(&said.err))
    }

    /// From what `nginx -V` says.
    fn of(version: &str) -> Self {
        let option = |name: &str| {
            let value = version
                .split_ascii_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.map(|value| PathBuf::from(value.trim_matches(['\'', '"'])))
        };
        let default = Self::default();
        let conf = option("--conf-path");
        let prefix = option("--prefix").or_else(|| {
            version
                .contains("configure arguments")
                .then(|| "/usr/local/nginx".into())
        });
        let prefix = prefix.unwrap_or(default.prefix);
        Self {
            conf: conf.map_or(default.conf, |conf| prefix.join(conf)),
            prefix,
        }
    }

    fn instance(self, pid: Option<u32>, root: PathBuf, command: &[String]) -> Instance {
        let option = |name: &str| {
            command
                .iter()
                .position(|word| word == name)
                .and_then(|at| command.get(at + 1))
        };
        let prefix = option("-p").map_or(self.prefix, PathBuf::from);
        let conf = option("-c").map_or(self.conf, |conf| prefix.join(conf));
        Instance {
            pid,
            root,
            conf,
            prefix,
        }
    }
}

/// What matters of a configuration.
#[derive(Clone, Debug, Default)]
struct Site {
    /// Formats of log lines: their escape, and the text.
    formats: BTreeMap<String, Format>,
    /// Directives that write our log: arguments and place.
    ours: Vec<(Vec<String>, String)>,
    /// Other logs.
    others: BTreeSet<String>,
    /// Servers and locations whose requests go to other logs only.
    missed: Vec<String>,
    /// Where addresses are rewritten (`set_real_ip_from`), and from which header.
    rewritten: Option<String>,
    header: Option<String>,
    /// Where connections come through a balancer that speaks the PROXY protocol.
    balanced: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Format {
    escape: String,
    text: String,
    place: String,
}

impl Site {
    fn of(root: &Directive, is_ours: impl Fn(&str) -> bool) -> Self {
        let mut site = Self::default();
        // The one that Nginx has by itself.
        let combined = Format {
            escape: "default".to_owned(),
            text: COMBINED.to_owned(),
            place: "built in".to_owned(),
        };
        site.formats.insert("combined".to_owned(), combined);
        for http in root.all("http") {
            for format in http.all("log_format") {
                let [name, rest @ ..] = format.args.as_slice() else {
                    continue;
                };
                let (escape, rest) = match rest {
                    [first, rest @ ..] if first.starts_with("escape=") => {
                        (&first["escape=".len()..], rest)
                    }
                    rest => ("default", rest),
                };
                let format = Format {
                    escape: escape.to_owned(),
                    text: rest.concat(),
                    place: format.place.clone(),
                };
                site.formats.insert(name.clone(), format);
            }
            site.walk(http, &is_ours, false);
        }
        site
    }

    /// Goes through a block. `inherited`: our log is written unless the block says otherwise.
    fn walk(&mut self, block: &Directive, is_ours: &impl Fn(&str) -> bool, inherited: bool) {
        let (mut any, mut ours, mut off) = (false, false, false);
        for log in block.all("access_log") {
            let Some(path) = log.args.first() else {
                continue;
            };
            any = true;
            off |= path == "off";
            if is_ours(path) {
                ours = true;
                self.ours.push((log.args.clone(), log.place.clone()));
            } else if path != "off" {
                self.others.insert(path.clone());
            }
        }
        let writes = if any { ours } else { inherited };
        let is_missed = match block.name.as_str() {
            "server" => !writes && !mentions(block, is_ours),
            // `access_log off` in a location is somebody's will; in a server it is a hole.
            "location" => inherited && !writes && !off,
            _ => false,
        };
        if is_missed {
            self.missed
                .push(format!("the {} at {}", block.name, block.place));
        }
        for directive in &block.block {
            match directive.name.as_str() {
                "set_real_ip_from" if self.rewritten.is_none() => {
                    self.rewritten = Some(directive.place.clone());
                }
                "real_ip_header" if self.header.is_none() => {
                    self.header = directive.args.first().cloned();
                }
                "listen"
                    if self.balanced.is_none()
                        && directive.args.iter().any(|arg| arg == "proxy_protocol") =>
                {
                    self.balanced = Some(directive.place.clone());
                }
                "server" | "location" | "if" | "limit_except" => {
                    self.walk(directive, is_ours, writes);
                }
                _ => {}
            }
        }
    }
}

/// Is our log written anywhere in a block?
fn mentions(block: &Directive, is_ours: &impl Fn(&str) -> bool) -> bool {
    let mut logs = block.all("access_log").filter_map(|log| log.args.first());
    logs.any(|path| is_ours(path)) || block.block.iter().any(|inner| mentions(inner, is_ours))
}

/// Has anybody written to the log within the last hour?
fn grows(log: &Path) -> bool {
    const RECENT: Duration = Duration::from_secs(3600);
    let modified = fs::metadata(log)
        .and_then(|metadata| metadata.modified())
        .ok();
    let since_epoch = modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    since_epoch.is_some_and(|at| {
        let at = Timestamp::from_millis(u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
        clock::wall().since(at) < RECENT
    })
}

/// `log` is what an `access_log` calls it.
fn judge(plan: &Plan, site: &Site, log: &str, grows: bool) -> Vec<Check> {
    let mut all = vec![written(site, log, grows)];
    let formats: BTreeSet<&str> = site.ours.iter().map(|(args, _)| format_of(args)).collect();
    for name in formats {
        match site.formats.get(name) {
            None => all.push(Check::fail(
                "Nginx log format",
                format!(
                    "the log is written in the format {name:?}, which is no JSON of the agent's"
                ),
                format!("{LOG_FORMAT} and: access_log {log} portcullis;"),
            )),
            Some(format) => {
                let (check, source, has_peer) = fields(plan, name, format);
                all.push(check);
                all.extend(source.map(|source| address(plan, site, &source, has_peer)));
            }
        }
    }
    all
}

/// The name of the format that an `access_log` uses.
fn format_of(args: &[String]) -> &str {
    args.get(1).map_or("combined", |second| {
        if second.contains('=') || second == "gzip" {
            "combined"
        } else {
            second
        }
    })
}

fn written(site: &Site, shown: &str, grows: bool) -> Check {
    let name = "Nginx log";
    let Some((_, place)) = site.ours.first() else {
        let others: Vec<_> = site.others.iter().take(5).cloned().collect();
        let instead = if others.is_empty() {
            String::new()
        } else {
            format!(" (it writes {})", others.join(", "))
        };
        if grows {
            return Check::warn(
                name,
                format!(
                    "no access_log that can be seen writes {shown}{instead}, and yet it grows: its format and its address field could not be checked"
                ),
                "run the doctor where the Nginx that writes it can be seen (as root, on its host)",
            );
        }
        return Check::fail(
            name,
            format!("no access_log writes {shown}{instead}: the agent would see nothing"),
            format!(
                "in http {{ }}: {LOG_FORMAT} access_log {shown} portcullis; then `nginx -t && nginx -s reload`; or correct source.log"
            ),
        );
    };
    let (mut found, mut remedies) = (Vec::new(), Vec::new());
    for (args, place) in &site.ours {
        let options = args.get(1..).unwrap_or_default();
        let has = |prefix: &str| options.iter().find(|option| option.starts_with(prefix));
        if let Some(buffer) = has("buffer=") {
            found.push(format!(
                "{buffer} at {place}: a client is seen only when the buffer is full or flushed"
            ));
            remedies.push("take buffer= and flush= away (or flush=1s at most)".to_owned());
        }
        if has("gzip").is_some() {
            found.push(format!("gzip at {place}: the agent cannot read it"));
            remedies.push("take gzip away".to_owned());
        }
        if let Some(condition) = has("if=") {
            found.push(format!(
                "{condition} at {place}: requests are left out, and what is left out is not guarded"
            ));
            remedies.push("take if= away, where the agent is to see everything".to_owned());
        }
    }
    if let Some(first) = site.missed.first() {
        let more = site.missed.len() - 1;
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        found.push(format!(
            "requests of {first}{more} are logged elsewhere or not at all, so they are not seen"
        ));
        if let Some((args, _)) = site.ours.first() {
            let path = args.first().map_or("", String::as_str);
            remedies.push(format!(
                "add `access_log {path} {};` there too",
                format_of(args)
            ));
        }
    }
    if found.is_empty() {
        Check::pass(name, format!("{shown} is written by {place}"))
    } else {
        // What is compressed is not read at all.
        let outcome = if found.iter().any(|found| found.starts_with("gzip")) {
            Outcome::Fail
        } else {
            Outcome::Warn
        };
        Check::bad(outcome, name, found.join("; "), remedies.join("; "))
    }
}

/// Writes a line as Nginx would. `value` gives a variable's value, and is told whether it stands between quotes.
fn render(text: &str, mut value: impl FnMut(&str, bool) -> String) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let (mut quoted, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        if c == '$' {
            let (name, next) = variable(after);
            if !name.is_empty() {
                out.push_str(&value(name, quoted));
                rest = next;
                continue;
            }
        }
        quoted ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        out.push(c);
        rest = after;
    }
    out
}

/// A variable's name, with or without braces, and what comes after it.
fn variable(text: &str) -> (&str, &str) {
    if let Some((name, rest)) = text.strip_prefix('{').and_then(|text| text.split_once('}')) {
        return (name, rest);
    }
    text.split_at(
        text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(text.len()),
    )
}

/// A line's worth of a variable, as an ordinary request makes it.
fn sample(name: &str, quoted: bool) -> String {
    match name {
        "msec" => "1700000000.123",
        "time_iso8601" => "2023-11-14T22:13:20+00:00",
        "time_local" => "14/Nov/2023:22:13:20 +0000",
        "status" => "404",
        // Not each of these is one, but the agent's parser asks only for what is in source_ip.
        name if is_address(name) => "192.0.2.1",
        _ if quoted => "x",
        _ => "0",
    }
    .to_owned()
}

fn is_address(name: &str) -> bool {
    name.ends_with("_addr") || name.starts_with("http_") || name == "proxy_add_x_forwarded_for"
}

/// Judges a format by letting the agent's own parser read a line of it. Says also what the address is taken from, and whether the
/// line has the connection's, too.
fn fields(plan: &Plan, name: &str, format: &Format) -> (Check, Option<String>, bool) {
    let title = "Nginx log format";
    let Format {
        escape,
        text,
        place,
    } = format;
    let line = render(text, sample);
    let parser = &plan.config.engine.format;
    let record = match parser.read(line.as_bytes()) {
        Ok(record) => record,
        Err(error) => {
            let template =
                field(text).map_or(String::new(), |source| format!("; source_ip is {source:?}"));
            let check = Check::fail(
                title,
                format!("the agent cannot read a line of {name:?} ({place}): {error}{template}"),
                format!("give the log a format of its own: {LOG_FORMAT}"),
            );
            return (check, None, false);
        }
    };
    let source = source(parser, text).or_else(|| field(text));
    let check = match escape.as_str() {
        "json" => Check::pass(
            title,
            format!("{name:?} ({place}) has what the agent needs, escape=json"),
        ),
        "none" => Check::fail(
            title,
            format!(
                "{name:?} ({place}) has escape=none: whoever sends a quote can forge fields, source_ip among them"
            ),
            format!("escape=json: log_format {name} escape=json …"),
        ),
        _ if !text.starts_with('{') => Check::pass(
            title,
            format!("{name:?} ({place}) has what the agent needs"),
        ),
        other => Check::warn(
            title,
            format!(
                "{name:?} ({place}) has escape={other}: lines with odd bytes are no JSON, and have to be repaired before they are read"
            ),
            format!("escape=json: log_format {name} escape=json …"),
        ),
    };
    (check, source, record.peer.is_some())
}

/// The variable that the agent takes the client's address from: the one whose value comes out of a line.
fn source(parser: &parse::Format, text: &str) -> Option<String> {
    let mut names = BTreeSet::new();
    render(text, |name, _| {
        names.insert(name.to_owned());
        String::new()
    });
    let client = "203.0.113.99";
    let is_it = |source: &String| {
        let line = render(text, |name, quoted| {
            if name == source {
                client.to_owned()
            } else {
                sample(name, quoted)
            }
        });
        let record = parser.read(line.as_bytes());
        record.is_ok_and(|record| record.client.to_string() == client)
    };
    names.into_iter().find(is_it).map(|name| format!("${name}"))
}

/// What stands in the field `source_ip`, variables by their names.
fn field(text: &str) -> Option<String> {
    let line = render(text, |name, quoted| {
        if quoted {
            format!("${name}")
        } else {
            "0".to_owned()
        }
    });
    let line: BTreeMap<String, serde_json::Value> = serde_json::from_str(&line).ok()?;
    Some(line.get("source_ip")?.as_str()?.to_owned())
}

fn address(plan: &Plan, site: &Site, source: &str, has_peer: bool) -> Check {
    let name = "Nginx client address";
    let header = site.header.as_deref().unwrap_or("X-Real-IP");
    let proxied = "packets come from the proxy, so a ban at the network card does nothing: name the proxies in source.proxies, add \
                   $realip_remote_addr to the log_format (README.md), and have their clients banned in Nginx (enforce.nginx); if no \
                   proxy is in front, take set_real_ip_from away";
    let proxies = !plan.config.engine.proxies.is_empty();
    match (source, &site.rewritten, &site.balanced) {
        ("$remote_addr", Some(place), _) if proxies && has_peer => Check::pass(
            name,
            format!(
                "source_ip is $remote_addr, rewritten from {header} ({place}); realip_remote_addr tells who came through a proxy, \
                 and source.proxies keeps those from being banned"
            ),
        ),
        ("$remote_addr", Some(place), _) if proxies => Check::warn(
            name,
            format!(
                "source_ip is $remote_addr, rewritten from {header} ({place}), and the log does not say whose connection it was: \
                 with source.proxies every client is taken for one that came through a proxy, and nobody is banned at the wire"
            ),
            "add \"realip_remote_addr\":\"$realip_remote_addr\" to the log_format",
        ),
        ("$remote_addr", Some(place), _) => Check::bad(
            plan.harm,
            name,
            format!("source_ip is $remote_addr, which is rewritten from {header} ({place})"),
            proxied,
        ),
        ("$remote_addr" | "$realip_remote_addr", None, None) => Check::pass(
            name,
            format!("source_ip is {source}, the sender of the packets"),
        ),
        ("$remote_addr", None, Some(place)) => Check::bad(
            plan.harm,
            name,
            format!(
                "connections come through a balancer (proxy_protocol, {place}), and source_ip is the balancer's: a ban cuts everybody off"
            ),
            "put the balancer on bans.allow, and guard where clients connect",
        ),
        ("$realip_remote_addr", ..) => Check::bad(
            plan.harm,
            name,
            "source_ip is $realip_remote_addr, the proxy in front: a ban cuts off everybody behind it",
            "put the proxy on bans.allow, and guard where clients connect",
        ),
        ("$proxy_protocol_addr", ..) => Check::bad(
            plan.harm,
            name,
            "source_ip is what a balancer says ($proxy_protocol_addr)",
            proxied,
        ),
        (source, ..) if source.contains("$http_") || source.contains("forwarded") => Check::fail(
            name,
            format!(
                "source_ip is {source:?}, which the client writes itself: anybody could have anybody banned"
            ),
            "take $remote_addr",
        ),
        (source, ..) => Check::warn(
            name,
            format!(
                "source_ip is {source:?}; whether that is the sender of the packets is not known"
            ),
            "take $remote_addr",
        ),
    }
}

fn file(log: &Path) -> Check {
    let name = "log file";
    let shown = log.display();
    let metadata = match fs::metadata(log) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return if log.parent().is_some_and(Path::is_dir) {
                Check::warn(
                    name,
                    format!("{shown} is not there yet"),
                    "Nginx makes it when it is reloaded with that access_log (`nginx -s reload`)",
                )
            } else {
                Check::fail(
                    name,
                    format!("neither {shown} nor its folder is there"),
                    "correct source.log, or make the folder",
                )
            };
        }
        Err(error) => {
            return Check::fail(
                name,
                format!("{shown} cannot be looked at: {error}"),
                "let the agent's user enter its folder",
            );
        }
    };
    if metadata.file_type().is_fifo() || !metadata.is_file() {
        return Check::fail(
            name,
            format!("{shown} is no ordinary file"),
            "let Nginx write to a file (a container's image may link its logs to /dev/stdout)",
        );
    }
    if access(log, AccessFlags::R_OK).is_err() {
        return Check::fail(
            name,
            format!("{shown} is not readable"),
            "run as root, or add the agent's user to the log's group (`usermod -aG adm …`)",
        );
    }
    Check::pass(
        name,
        format!("{shown} is readable, {} KiB", metadata.len().div_ceil(1024)),
    )
}

/// Does a running Nginx have the log open? After a rotation without a signal, it writes to the old file for ever.
fn open_in(pid: u32, log: &Path) -> Option<Check> {
    let name = "Nginx log, open";
    let log_id = identity(log)?;
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Some(Check::skipped(
            name,
            "only root can see what Nginx has open",
        ));
    };
    let is_log = |path: PathBuf| identity(&path) == Some(log_id);
    if open.flatten().any(|entry| is_log(entry.path())) {
        return Some(Check::pass(name, format!("pid {pid} writes to it")));
    }
    Some(Check::warn(
        name,
        format!(
            "pid {pid} does not have {} open: it was rotated or configured without telling Nginx",
            log.display()
        ),
        "`nginx -t && nginx -s reload` (after a rotation, `nginx -s reopen`)",
    ))
}

/// Is the log rotated, by logrotate?
fn rotation(log: &Path) -> Check {
    let main = fs::read_to_string("/etc/logrotate.conf");
    let entries = fs::read_dir("/etc/logrotate.d")
        .into_iter()
        .flatten()
        .flatten();
    if main.is_err() && command::find("logrotate").is_none() {
        return Check::skipped(
            "log rotation",
            "no logrotate here: whatever rotates the log must make Nginx open the new one (`nginx -s reopen`)",
        );
    }
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.sort_unstable();
    let texts: Vec<String> = main
        .into_iter()
        .chain(
            files
                .iter()
                .filter_map(|path| fs::read_to_string(path).ok()),
        )
        .collect();
    rotated(&texts, log)
}

fn rotated(texts: &[String], log: &Path) -> Check {
    let name = "log rotation";
    let shown = log.display();
    for text in texts {
        let (mut fits, mut open) = (false, false);
        for line in text
            .lines()
            .map(str::trim)
            .filter(|line| !line.starts_with('#'))
        {
            if !open {
                let patterns = line.trim_end_matches('{').split_ascii_whitespace();
                fits |= patterns
                    .map(|pattern| pattern.trim_matches(['"', '\'']))
                    .any(|pattern| {
                        pattern.starts_with('/')
                            && conf::matches(pattern.as_bytes(), shown.to_string().as_bytes())
                    });
                open = line.ends_with('{');
            } else if fits && line == "copytruncate" {
                return Check::warn(
                    name,
                    format!(
                        "logrotate copies and truncates {shown}: lines written in between are lost"
                    ),
                    "take copytruncate away, and let it tell Nginx (`nginx -s reopen` in postrotate)",
                );
            } else if line == "}" {
                if fits {
                    return Check::pass(name, "logrotate does it");
                }
                open = false;
            }
        }
    }
    Check::warn(
        name,
        format!("nothing of logrotate's names {shown}: it grows until the disk is full"),
        format!(
            "add {shown} to the first line of /etc/logrotate.d/nginx (Debian's names *.log only)"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const LOG: &str = "/var/log/nginx/portcullis.json";

    fn plan(mode: &str) -> Plan {
        Plan::new(&Config::parse(&format!("mode = {mode:?}")).unwrap())
    }

    fn site(text: &str) -> Site {
        Site::of(&conf::parse_text(text).unwrap(), |path| path == LOG)
    }

    fn judged(mode: &str, text: &str) -> Vec<Check> {
        judge(&plan(mode), &site(text), LOG, false)
    }

    fn outcomes(checks: &[Check]) -> Vec<Outcome> {
        checks.iter().map(|check| check.outcome).collect()
    }

    fn good(more: &str) -> String {
        format!("http {{ {LOG_FORMAT} access_log {LOG} portcullis; {more} }}")
    }

    #[test]
    fn what_the_readme_says_passes() {
        let readme = include_str!("../../../README.md");
        let text = readme
            .split("```nginx")
            .nth(1)
            .unwrap()
            .split("```")
            .next()
            .unwrap();
        let checks = judged(
            "enforce",
            &format!("http {{ {text} server {{ listen 80; }} }}"),
        );
        assert_eq!(outcomes(&checks), [Outcome::Pass; 3], "{checks:#?}");
        assert_eq!(outcomes(&judged("enforce", &good(""))), [Outcome::Pass; 3]);
    }

    #[test]
    fn a_log_that_nobody_writes_is_a_failure_with_the_lines_to_add() {
        let checks = judged(
            "observe",
            "http { access_log /var/log/nginx/access.log; } stream { access_log /var/log/nginx/portcullis.json x; }",
        );
        assert_eq!(outcomes(&checks), [Outcome::Fail]);
        assert!(
            checks[0].found.contains("access.log")
                && checks[0].remedy.as_deref().unwrap().contains("escape=json")
        );
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let config = format!("[source]\nlog = ['{}/*.json']", folder.path().display());
        let plan = Plan::new(&Config::parse(&config).unwrap());
        let told = checks(&plan);
        assert_eq!(outcomes(&told), [Outcome::Warn], "{told:#?}");
        assert_eq!(told[0].name, "log pattern");
        fs::write(folder.path().join("a.json"), "what\n").unwrap();
        let told = checks(&plan);
        assert!(told.iter().all(|check| check.name != "log pattern"));
        let lines = told.iter().find(|check| check.name == "log lines").unwrap();
        assert_eq!(lines.outcome, Outcome::Fail);
    }

    #[test]
    fn the_nginx_that_writes_our_log_is_chosen_of_several() {
        let seen = ["http { }", "http {", "http { access_log OURS; }"].map(|text| {
            let read = conf::parse_text(text).map(|root| (root, 1));
            (Built::default().instance(None, "/".into(), &[]), read)
        });
        let chosen = |seen: &[Seen]| {
            let (_, read) = choose(seen, |_, path| path == "OURS")?;
            Some(read.map(|(_, site)| site.ours.len()).map_err(String::clone))
        };
        assert_eq!(chosen(&seen), Some(Ok(1)));
        assert_eq!(chosen(&seen[..2]), Some(Ok(0)));
        assert!(chosen(&seen[1..2]).unwrap().is_err());
        assert_eq!(chosen(&[]), None);
    }

    #[test]
    fn a_log_that_another_nginx_writes_is_not_judged_by_this_one() {
        let elsewhere = site("http { access_log /var/log/nginx/access.log; }");
        let checks = judge(&plan("enforce"), &elsewhere, LOG, true);
        assert_eq!(outcomes(&checks), [Outcome::Warn], "{checks:#?}");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(grows(file.path()) && !grows(Path::new("/no/such/file")));
    }

    #[test]
    fn a_rewritten_address_makes_bans_useless() {
        let behind = good("set_real_ip_from 10.0.0.0/8; real_ip_header CF-Connecting-IP;");
        let checks = judged("enforce", &behind);
        assert_eq!(checks[2].outcome, Outcome::Fail);
        assert!(checks[2].found.contains("CF-Connecting-IP"), "{checks:#?}");
        assert_eq!(judged("observe", &behind)[2].outcome, Outcome::Warn);
        let inner = good("server { location / { set_real_ip_from 10.0.0.0/8; } }");
        assert_eq!(judged("enforce", &inner)[2].outcome, Outcome::Fail);
        // The header alone changes nothing.
        assert_eq!(
            judged("enforce", &good("real_ip_header X-Real-IP;"))[2].outcome,
            Outcome::Pass
        );
        assert_eq!(
            judged("enforce", &good("server { listen 80 proxy_protocol; }"))[2].outcome,
            Outcome::Fail
        );
    }

    #[test]
    fn an_address_that_the_client_writes_is_refused() {
        for (variable, outcome) in [
            ("$http_x_forwarded_for", Outcome::Fail),
            ("${http_x_real_ip}", Outcome::Fail),
            ("$proxy_add_x_forwarded_for", Outcome::Fail),
            ("$proxy_protocol_addr", Outcome::Fail),
            ("$some_addr", Outcome::Warn),
            ("$realip_remote_addr", Outcome::Pass),
        ] {
            let checks = judged("enforce", &good("").replace("$remote_addr", variable));
            assert_eq!(checks[2].outcome, outcome, "{variable}: {checks:#?}");
        }
        let proxy =
            good("set_real_ip_from 10.0.0.1;").replace("$remote_addr", "$realip_remote_addr");
        assert_eq!(judged("enforce", &proxy)[2].outcome, Outcome::Fail);
    }

    #[test]
    fn with_proxies_named_a_rewritten_address_is_what_it_should_be() {
        let plan = Plan::new(
            &Config::parse("mode = 'enforce'\n[source]\nproxies = ['10.0.0.0/8']").unwrap(),
        );
        let judged = |text: &str| judge(&plan, &site(text), LOG, false)[2].outcome;
        let rich = good("set_real_ip_from 10.0.0.0/8;");
        let plain = rich.replace("\"realip_remote_addr\":\"$realip_remote_addr\",", "");
        assert_eq!(
            (judged(&plain), judged(&rich)),
            (Outcome::Warn, Outcome::Pass)
        );
    }

    #[test]
    fn a_format_is_judged_by_the_agent_s_own_parser() {
        for (from, to, outcome) in [
            ("escape=json ", "", Outcome::Warn),
            ("escape=json", "escape=none", Outcome::Fail),
            ("\"timestamp\":\"$msec\",", "", Outcome::Fail),
            ("$msec", "$time_local", Outcome::Pass),
            ("$msec", "$time_iso8601", Outcome::Pass),
            ("\"$msec\"", "$msec", Outcome::Pass),
            ("\"$status\"", "$status", Outcome::Pass),
            ("source_ip", "client", Outcome::Fail),
            ("$remote_addr", "$remote_user", Outcome::Fail),
            ("\"$request_id\"}", "\"$request_id\"", Outcome::Fail),
        ] {
            let checks = judged("enforce", &good("").replacen(from, to, 1));
            assert_eq!(checks[1].outcome, outcome, "{from} -> {to}: {checks:#?}");
        }
        let combined = judged("enforce", &format!("http {{ access_log {LOG}; }}"));
        assert_eq!(outcomes(&combined), [Outcome::Pass; 3]);
        assert!(combined[1].found.contains("combined"));
        let other = format!("http {{ log_format x '$status $remote_addr'; access_log {LOG} x; }}");
        assert_eq!(
            outcomes(&judged("enforce", &other)),
            [Outcome::Pass, Outcome::Fail]
        );
    }

    #[test]
    fn what_delays_or_leaves_out_lines_is_told() {
        for (option, outcome, expected) in [
            ("buffer=64k flush=5s", Outcome::Warn, "buffer=64k"),
            ("gzip", Outcome::Fail, "cannot read"),
            ("if=$loggable", Outcome::Warn, "left out"),
        ] {
            let checks = judged(
                "enforce",
                &good("").replace("json portcullis;", &format!("json portcullis {option};")),
            );
            assert_eq!(checks[0].outcome, outcome, "{checks:#?}");
            assert!(checks[0].found.contains(expected), "{checks:#?}");
        }
    }

    #[test]
    fn a_server_with_a_log_of_its_own_is_a_hole() {
        let missed = |more: &str| site(&good(more)).missed.len();
        assert_eq!(
            missed("server { access_log /var/log/nginx/shop.log; location / { } }"),
            1
        );
        assert_eq!(missed("server { access_log off; }"), 1);
        assert_eq!(
            missed("server { location = /health { access_log off; } }"),
            0
        );
        assert_eq!(
            missed("server { location /api { access_log /var/log/api.log; } }"),
            1
        );
        assert_eq!(
            missed(&format!(
                "server {{ access_log /x.log; access_log {LOG} portcullis; }}"
            )),
            0
        );
        assert_eq!(missed("server { }"), 0);
        let only_one = format!(
            "http {{ {LOG_FORMAT} access_log /a.log; server {{ access_log {LOG} portcullis; }} server {{ }} }}"
        );
        assert_eq!(site(&only_one).missed.len(), 1);
    }

    #[test]
    fn an_nginx_says_where_its_configuration_is() {
        let said = "nginx version: nginx/1.22.1\nconfigure arguments: --with-cc-opt='-g -O2' --prefix=/usr/share/nginx --conf-path=/etc/nginx/nginx.conf";
        let built = Built::of(said);
        assert_eq!(
            built,
            Built {
                prefix: "/usr/share/nginx".into(),
                conf: "/etc/nginx/nginx.conf".into()
            }
        );
        assert_eq!(Built::of("gibberish"), Built::default());
        let command =
            master(b"nginx: master process /usr/sbin/nginx -p /srv/ -c conf/my.conf\0\0").unwrap();
        let instance = built.instance(Some(7), "/".into(), &command);
        assert_eq!(instance.conf, Path::new("/srv/conf/my.conf"));
        assert!(instance.is("logs/a.json", Path::new("/srv/logs/a.json")));
        assert!(!instance.is("/var/log/b.json", Path::new("/srv/logs/a.json")));
        assert_eq!(master(b"nginx: worker process\0"), None);
        assert_eq!(master(b"vim nginx: master process\0"), None);
    }

    #[test]
    fn rotation_is_found_where_it_is() {
        let judged = |text: &str| rotated(&[text.to_owned()], Path::new(LOG));
        assert_eq!(
            judged("/var/log/nginx/*.log {\n daily\n}\n").outcome,
            Outcome::Warn
        );
        assert_eq!(judged("/var/log/nginx/*.log /var/log/nginx/*.json {\n daily\n postrotate\n x\n endscript\n}\n").outcome, Outcome::Pass);
        assert_eq!(
            judged("/var/log/nginx/*.log\n\"/var/log/nginx/*.json\"\n{\n daily\n}\n").outcome,
            Outcome::Pass
        );
        let copied = judged("/var/log/nginx/* {\n copytruncate\n}\n");
        assert!(copied.found.contains("lost"), "{copied:?}");
        assert_eq!(judged("# /var/log/nginx/* {\n").outcome, Outcome::Warn);
        assert_eq!(judged("{{{}}}\n}\n{").outcome, Outcome::Warn);
    }

    #[test]
    fn any_format_at_all_is_survived() {
        for text in [
            "",
            "$",
            "${",
            "${}",
            "\\",
            "\"\\",
            "$$$",
            "é$é",
            "{\"source_ip\":1}",
            "[]",
        ] {
            let format = Format {
                escape: "json".into(),
                text: text.into(),
                place: "x:1".into(),
            };
            assert_eq!(
                fields(&plan("enforce"), "f", &format).0.outcome,
                Outcome::Fail,
                "{text}"
            );
        }
    }
}
