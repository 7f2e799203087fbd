//! `portcullis import` and `portcullis export` against an agent, all as they are typed; with the back end that touches nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics with its evidence, its helpers too"
)]

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use portcullis::runtime::clock;
use tempfile::TempDir;

/// An agent that has no lines to read.
struct Place {
    folder: TempDir,
    agent: Option<Child>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _gone = agent.kill();
            let _gone = agent.wait();
        }
    }
}

impl Place {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().display();
        let config = format!(
            "[source]\nlog = [\"{here}/access.log\"]\n[enforce]\nbackends = [\"dry-run\"]\ninterfaces = [\"lo\"]\n\
             [state]\ndir = \"{here}/state\"\n[control]\nsocket = \"{here}/socket\"\n[bans]\nallow = [\"192.0.2.0/24\"]\n"
        );
        fs::write(folder.path().join("p.toml"), config).unwrap();
        fs::write(folder.path().join("access.log"), "").unwrap();
        let mut place = Self {
            folder,
            agent: None,
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
        command.args(["run", "--config"]).arg(place.path("p.toml"));
        let said = fs::File::create(place.path("said")).unwrap();
        place.agent = Some(command.stderr(said).stdout(Stdio::null()).spawn().unwrap());
        let answers = |place: &Self| {
            sleep(Duration::from_millis(50));
            place.ask(&["status"]).status.success()
        };
        let came = (0..200).any(|_| answers(&place));
        let said = fs::read_to_string(place.path("said")).unwrap();
        assert!(came, "the agent does not answer: {said}");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// In the folder of the lists.
    fn ask(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
        command.args(words).arg("--socket").arg(self.path("socket"));
        command.current_dir(self.folder.path()).output().unwrap()
    }

    fn export(&self, words: &[&str]) -> String {
        let output = self.ask(&[&["export"], words].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// But for since when.
fn without_since(export: &str) -> Vec<String> {
    let line = |line: &str| {
        let mut ban: serde_json::Value = serde_json::from_str(line).unwrap();
        ban["since"].take();
        ban.to_string()
    };
    export.lines().map(line).collect()
}

#[test]
fn what_is_refused_or_not_understood_is_said_and_the_rest_is_in_force() {
    let place = Place::start();
    let list = "192.0.2.7\n198.51.100.1 # a guest\nnobody\n10.0.0.0/7\n198.51.100.0/30\n";
    fs::write(place.path("list"), list).unwrap();
    let dry = place.ask(&["import", "--dry-run", "list"]);
    assert_eq!(dry.status.code(), Some(1), "a line is not understood");
    assert!(
        stdout(&dry).contains("198.51.100.1  until it is lifted  imported\n"),
        "{dry:?}"
    );
    assert_eq!(place.export(&[]), "");

    let output = place.ask(&["import", "list"]);
    assert_eq!(output.status.code(), Some(1));
    let said = stdout(&output);
    assert!(
        said.starts_with("2 banned, 0 for as long already, 2 refused\n"),
        "{said}"
    );
    assert!(
        said.contains("refused: 192.0.2.7 is on the allowlist (192.0.2.0/24)"),
        "{said}"
    );
    assert!(said.contains("10.0.0.0/7 is too wide"), "{said}");
    let said = stderr(&output);
    assert!(
        said.contains("list, line 3: \"nobody\" is neither an IP address"),
        "{said}"
    );
    assert!(
        said.contains("list (plain): 4 bans read, 1 line not understood\n"),
        "{said}"
    );
    assert_eq!(
        place.export(&["--format", "plain"]),
        "198.51.100.0/30\n198.51.100.1\n"
    );

    // Who is banned for good stays so; `--for` gives the others an end.
    fs::write(place.path("list"), "198.51.100.1\n198.51.100.9\n").unwrap();
    let output = place.ask(&["import", "--for", "2h", "--reason", "again", "list"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        stdout(&output),
        "1 banned, 1 for as long already, 0 refused\n"
    );
    let csv = place.export(&["--format", "csv"]);
    let ours = csv
        .lines()
        .find(|line| line.starts_with("198.51.100.9,"))
        .unwrap();
    assert!(ours.ends_with(",,operator,again,false"), "{csv}");
    assert!(
        csv.contains(",permanent,,operator,imported,false\n"),
        "{csv}"
    );

    let output = place.ask(&["import", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot read nowhere"),
        "{output:?}"
    );
    let output = place.ask(&["import", "--format", "xml", "list"]);
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn bans_move_from_agent_to_agent_with_their_ends() {
    let (from, to) = (Place::start(), Place::start());
    for words in [
        &[
            "ban",
            "198.51.100.7",
            "--for",
            "90m",
            "--reason",
            "two, \"words\"",
        ][..],
        &["ban", "2001:db8:7::/64", "--observe"],
        &["ban", "203.0.113.0/24"],
    ] {
        let output = from.ask(words);
        assert!(output.status.success(), "{output:?}");
    }
    let exported = from.export(&["--all"]);
    assert_eq!(exported.lines().count(), 3, "{exported}");
    for form in ["json", "csv"] {
        fs::write(to.path("bans"), from.export(&["--format", form])).unwrap();
        let output = to.ask(&["import", "bans"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(without_since(&to.export(&[])), without_since(&exported));
    }
    // And what `bans` prints.
    let bans = from.ask(&["bans", "--json", "--sort", "until"]);
    fs::write(to.path("bans"), bans.stdout).unwrap();
    let output = to.ask(&["import", "bans"]);
    assert_eq!(
        stdout(&output),
        "0 banned, 3 for as long already, 0 refused\n"
    );
    let sorted = stdout(&from.ask(&["bans", "--sort", "until"]));
    let first = sorted.lines().nth(1).unwrap();
    assert!(first.starts_with("198.51.100.7 "), "{sorted}");
}

#[test]
fn ten_thousands_of_addresses_take_seconds() {
    let place = Place::start();
    let mut list = String::new();
    for n in 0..20_000_u32 {
        let _ = writeln!(list, "10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
    }
    fs::write(place.path("list"), list).unwrap();
    let begin = clock::boot();
    let output = place.ask(&["import", "list"]);
    let took = clock::boot().saturating_sub(begin);
    assert_eq!(
        stdout(&output),
        "20000 banned, 0 for as long already, 0 refused\n",
        "{output:?}"
    );
    println!("20,000 addresses took {took:?}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(place.export(&["--format", "plain"]).lines().count(), 20_000);
}
