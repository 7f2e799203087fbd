//! The file that Nginx includes: always whole, and put back as it was when Nginx does not take it.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use portcullis_engine::Subject;

use super::Form;

/// How the file begins.
const HEADER: &str = "# Written by Portcullis. Edits are overwritten.\n";

impl Form {
    const ALL: [Self; 2] = [Self::Deny, Self::Geo];

    fn text(self, banned: &BTreeSet<Subject>) -> Vec<u8> {
        let (before, behind) = self.around();
        let mut text = HEADER.to_owned();
        for subject in banned {
            // Cannot fail for a string.
            let _written = writeln!(text, "{before}{subject}{behind}");
        }
        text.into_bytes()
    }

    fn banned(self, content: &[u8]) -> Option<BTreeSet<Subject>> {
        let lines = str::from_utf8(content).ok()?.strip_prefix(HEADER)?.lines();
        let (before, behind) = self.around();
        let subject = |line: &str| -> Option<Subject> {
            let rest = line.strip_prefix(before)?;
            rest.strip_suffix(behind)?.parse().ok()
        };
        let banned = lines.map(subject).collect::<Option<_>>()?;
        (self.text(&banned) == content).then_some(banned)
    }

    /// What goes around a subject.
    const fn around(self) -> (&'static str, &'static str) {
        match self {
            Self::Deny => ("deny ", ";"),
            Self::Geo => ("", " 1;"),
        }
    }
}

/// The file, and the two beside it while it is being changed. Their names are those that no wildcard of Nginx matches.
#[derive(Debug)]
pub(super) struct Include {
    path: PathBuf,
    form: Form,
    folder: PathBuf,
    /// Becomes another file when it is whole.
    fresh: PathBuf,
    /// What the include is to say again if Nginx does not take what it says now. While it is there, a change is under way.
    former: PathBuf,
}

impl Include {
    /// # Errors
    /// When the path cannot be that of a file.
    pub(super) fn new(path: &Path, form: Form) -> Result<Self> {
        let name = path
            .file_name()
            .with_context(|| format!("{} names no file to include", path.display()))?
            .to_string_lossy();
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        Ok(Self {
            path: path.to_owned(),
            form,
            folder: folder.to_owned(),
            fresh: folder.join(format!(".{name}.fresh.tmp")),
            former: folder.join(format!(".{name}.former.tmp")),
        })
    }

    /// What the file says when these are banned. The same bans make the same file.
    pub(super) fn text(&self, banned: &BTreeSet<Subject>) -> Vec<u8> {
        self.form.text(banned)
    }

    /// What the file says; none without a file.
    pub(super) fn read(&self) -> Result<Option<Vec<u8>>> {
        match fs::read(&self.path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read {}", self.path.display()))
            }
        }
    }

    /// Sees that a mistake in the configuration costs nobody's file its content.
    ///
    /// # Errors
    /// When there are lines in it and it is not ours.
    pub(super) fn claim(&self, content: &[u8]) -> Result<()> {
        ensure!(
            content.starts_with(HEADER.as_bytes()) || !has_lines(content),
            "{} is not a file of Portcullis: empty it, or name another one to be included by Nginx",
            self.path.display()
        );
        Ok(())
    }

    /// Makes ready for changes. Returns what the file says, and whether it was made to say so just now, so that Nginx may have
    /// read something else: it was not there, or a run was killed in the middle of a trial.
    ///
    /// # Errors
    /// One sentence with the remedy, when it cannot be changed.
    pub(super) fn open(&self) -> Result<(Vec<u8>, bool)> {
        let is_undone = self.undo()?;
        let there = self.read()?;
        if let Some(content) = &there {
            self.claim(content)?;
        }
        let remedy = || {
            format!(
                "the include of Nginx cannot be in {}: create that folder and let the agent write there (under systemd: \
                 ReadWritePaths=), or name another one",
                self.folder.display()
            )
        };
        let empty = self.text(&BTreeSet::new());
        self.write_fresh(&empty).with_context(remedy)?;
        if let Some(content) = there {
            remove(&self.fresh).with_context(remedy)?;
            return Ok((content, is_undone));
        }
        // Nginx does not start without what it is to include.
        self.rename(&self.fresh, &self.path).with_context(remedy)?;
        Ok((empty, true))
    }

    /// Makes the file say something else, for a trial: until [`Include::keep`] or [`Include::undo`].
    pub(super) fn try_out(&self, content: &[u8], former: &[u8]) -> Result<()> {
        // First, so that nothing has to be written to go back: the disk may be full by then.
        self.place(former, &self.former)?;
        self.place(content, &self.path)
    }

    /// The trial is over: it stays.
    pub(super) fn keep(&self) -> Result<()> {
        remove(&self.former).with_context(|| format!("cannot remove {}", self.former.display()))
    }

    /// The trial is over: the file says again what it said before. Says whether there was a trial.
    pub(super) fn undo(&self) -> Result<bool> {
        match self.rename(&self.former, &self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| {
                format!("cannot put back what {} said before", self.path.display())
            }),
        }
    }

    /// Is there a trial that was neither kept nor undone?
    pub(super) fn is_on_trial(&self) -> bool {
        fs::exists(&self.former).unwrap_or(false)
    }

    fn place(&self, content: &[u8], at: &Path) -> Result<()> {
        let placed = self
            .write_fresh(content)
            .and_then(|()| self.rename(&self.fresh, at));
        placed.with_context(|| format!("cannot write {}", at.display()))
    }

    fn write_fresh(&self, content: &[u8]) -> io::Result<()> {
        // A run that was killed may have left it.
        remove(&self.fresh)?;
        let written = write_new(&self.fresh, content);
        if written.is_err() {
            // A part of it would keep a full disk full. It could not be made or is removed; the first reason is told.
            let _removed = remove(&self.fresh);
        }
        written
    }

    /// One instead of the other at once, to last through a power cut.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        File::open(&self.folder)?.sync_all()
    }
}

/// Who is banned by what such a file says, in either form: an earlier run may have been told another one. None if we have
/// not written it so.
pub(super) fn banned(content: &[u8]) -> Option<BTreeSet<Subject>> {
    Form::ALL.iter().find_map(|form| form.banned(content))
}

/// Does it say anything to Nginx?
pub(super) fn has_lines(content: &[u8]) -> bool {
    let mut lines = content.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines.any(|line| !line.is_empty() && !line.starts_with(b"#"))
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    // Whatever the umask: it holds no secret, and people look at it.
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(content)?;
    file.sync_all()
}

/// Removes a file; fine if it is not there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    fn subjects(texts: &[&str]) -> BTreeSet<Subject> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn include(form: Form) -> Include {
        Include::new(Path::new("/etc/nginx/banned.conf"), form).unwrap()
    }

    #[test]
    fn each_form_is_what_nginx_reads() {
        let banned = subjects(&[
            "2001:db8:1:2::/64",
            "203.0.113.7",
            "192.0.2.0/24",
            "2001:db8::1",
        ]);
        let deny = include(Form::Deny).text(&banned);
        assert_eq!(
            String::from_utf8(deny).unwrap(),
            "# Written by Portcullis. Edits are overwritten.\ndeny 192.0.2.0/24;\ndeny 203.0.113.7;\ndeny 2001:db8::1;\n\
             deny 2001:db8:1:2::/64;\n"
        );
        let geo = include(Form::Geo).text(&banned);
        assert!(
            String::from_utf8(geo)
                .unwrap()
                .contains("\n192.0.2.0/24 1;\n203.0.113.7 1;\n")
        );
    }

    #[test]
    fn what_somebody_else_has_written_is_told_apart() {
        let deny = include(Form::Deny);
        let ours = deny.text(&subjects(&["192.0.2.1", "192.0.2.2"]));
        let text = String::from_utf8(ours.clone()).unwrap();
        assert!(banned(&ours).is_some());
        for edited in [
            text.replace("192.0.2.1;", "192.0.2.1; # the boss"),
            text.replace("192.0.2.1", "192.0.2.3"),
            text.replace("192.0.2.2", "192.0.2.1"),
            text.replace('#', "##"),
            format!("{text}\n"),
            text.trim_end().to_owned(),
            String::new(),
        ] {
            assert_eq!(banned(edited.as_bytes()), None, "{edited}");
        }
    }

    #[test]
    fn a_file_of_somebody_else_is_not_claimed() {
        let deny = include(Form::Deny);
        assert!(deny.claim(b"").is_ok());
        assert!(deny.claim(b"# to be filled\n\n  # soon\n").is_ok());
        assert!(deny.claim(format!("{HEADER}allow all;").as_bytes()).is_ok());
        let refused = deny.claim(b"user www-data;\n").unwrap_err().to_string();
        assert!(refused.contains("is not a file of Portcullis"), "{refused}");
    }

    #[test]
    fn the_files_beside_it_are_out_of_every_wildcard_s_reach() {
        let include = include(Form::Deny);
        for beside in [&include.fresh, &include.former] {
            let name = beside.file_name().unwrap().to_str().unwrap();
            assert_eq!(beside.parent(), include.path.parent());
            assert!(name.starts_with('.'), "{name}");
            assert_eq!(beside.extension().unwrap(), "tmp");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_written_reads_back(
            v4 in prop::collection::btree_set((any::<u32>(), 0u8..=32), 0..20),
            v6 in prop::collection::btree_set((any::<u128>(), 0u8..=128), 0..20),
            geo in any::<bool>(),
        ) {
            let v4 = v4.into_iter().map(|(bits, length)| (IpAddr::V4(bits.into()), length));
            let v6 = v6.into_iter().map(|(bits, length)| (IpAddr::V6(bits.into()), length));
            let banned: BTreeSet<Subject> =
                v4.chain(v6).map(|(address, length)| format!("{address}/{length}").parse().unwrap()).collect();
            let include = include(if geo { Form::Geo } else { Form::Deny });
            prop_assert_eq!(super::banned(&include.text(&banned)), Some(banned));
        }
    }
}
