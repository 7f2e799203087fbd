//! A disk that can be full, or read-only.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A small disk; unmounted on drop.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// Mounts one, of a size such as `8m`.
    ///
    /// # Errors
    /// Without root.
    pub fn new(path: &Path, size: &str) -> Result<Self> {
        fs::create_dir_all(path)?;
        let options = format!("size={size}");
        let none = MsFlags::empty();
        mount(Some("tmpfs"), path, Some("tmpfs"), none, Some(&*options))
            .with_context(|| format!("cannot mount a tmpfs at {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Lets nobody write, or everybody again.
    ///
    /// # Errors
    /// When somebody is writing.
    pub fn set_read_only(&self, is: bool) -> Result<()> {
        let read_only = if is {
            MsFlags::MS_RDONLY
        } else {
            MsFlags::empty()
        };
        let flags = MsFlags::MS_REMOUNT | read_only;
        mount(Some("tmpfs"), &self.0, None::<&str>, flags, None::<&str>)?;
        Ok(())
    }

    /// Leaves no room.
    pub fn fill(&self) {
        // It is to be full, not the file to be whole.
        let ballast = std::iter::repeat_n([7; 4096], 16_384).flatten();
        let _full = fs::write(self.0.join("ballast"), ballast.collect::<Vec<u8>>());
    }

    /// Takes away what fills it.
    ///
    /// # Errors
    /// When it was not filled.
    pub fn make_room(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}
