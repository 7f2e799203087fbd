//! What the tests of verbs have in common: a folder with an agent in it, with the back end that touches nothing.
#![allow(
    dead_code,
    clippy::allow_attributes,
    unreachable_pub,
    reason = "each test crate uses its part"
)]

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use tempfile::TempDir;

/// A folder for an agent, and the agent while it runs.
pub struct Place {
    folder: TempDir,
    agent: Option<Child>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Place {
    /// With an empty log, and these networks on the allowlist.
    pub fn new(allow: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().display();
        let config = format!(
            "[source]\nlog = [\"{here}/access.log\"]\n[enforce]\nbackends = [\"dry-run\"]\ninterfaces = [\"lo\"]\n\
             [state]\ndir = \"{here}/state\"\n[control]\nsocket = \"{here}/socket\"\n[bans]\nallow = {allow:?}\n"
        );
        fs::write(folder.path().join("p.toml"), config).unwrap();
        fs::write(folder.path().join("access.log"), "").unwrap();
        Self {
            folder,
            agent: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns when it answers.
    pub fn start(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
        command.args(["run", "--config"]).arg(self.path("p.toml"));
        let said = fs::File::create(self.path("said")).unwrap();
        self.agent = Some(command.stderr(said).stdout(Stdio::null()).spawn().unwrap());
        self.until("an answer", || self.ask(&["status"]).status.success());
    }

    /// As a crash does.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _gone = agent.kill();
            let _gone = agent.wait();
        }
    }

    /// Asks the agent, in its folder.
    pub fn ask(&self, words: &[&str]) -> Output {
        self.run(words, "--socket", "socket")
    }

    /// Reads what an agent has left behind.
    pub fn read(&self, words: &[&str]) -> Output {
        self.run(words, "--config", "p.toml")
    }

    fn run(&self, words: &[&str], option: &str, file: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
        command.args(words).arg(option).arg(self.path(file));
        command.current_dir(self.folder.path()).output().unwrap()
    }

    pub fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let is_so = || {
            sleep(Duration::from_millis(50));
            is_so()
        };
        let came = (0..200).any(|_| is_so());
        let said = fs::read_to_string(self.path("said")).unwrap();
        assert!(came, "{what} has not come: {said}");
    }
}

pub fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}
