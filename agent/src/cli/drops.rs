//! `portcullis drops`: packets of banned sources as they come in, a sample of them.

use std::{
    fs::File,
    io::{self, Write},
    net::Ipv6Addr,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::maps::{Map, MapData, RingBuf};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    net::if_::if_indextoname,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use portcullis_common::{SCHEMA, event::Sample, names, stats::Counter};
use portcullis_engine::Timestamp;
use serde::Serialize;

use crate::runtime::clock;

/// One packet, as it is printed.
#[derive(Debug, Serialize)]
struct Row {
    time: Timestamp,
    source: String,
    interface: String,
    bytes: u32,
    verdict: &'static str,
}

/// Prints samples until `most` of them have been, or for ever.
///
/// # Errors
/// When there is no program of ours, no rights, or another reader: each sample goes to one.
pub(super) fn follow(
    pin_dir: &Path,
    most: Option<u64>,
    all: bool,
    json: bool,
    out: &mut impl Write,
) -> Result<()> {
    let folder = pin_dir.join(format!("v{SCHEMA}"));
    let pin = folder.join(names::SAMPLES);
    let map = MapData::from_pin(&pin).with_context(|| {
        format!(
            "cannot open {}: is an agent at work with XDP, and are you root? (with iptables there are no samples; \
             `portcullis bans` counts packets)",
            pin.display()
        )
    })?;
    let folder =
        File::open(&folder).with_context(|| format!("cannot open {}", folder.display()))?;
    let _one_reader =
        Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            Errno::EWOULDBLOCK => {
                anyhow!("another `portcullis drops` is running, and each sample goes to one reader")
            }
            error => anyhow!(error).context("cannot lock the pin folder"),
        })?;
    let mut samples: RingBuf<MapData> = Map::RingBuf(map).try_into()?;
    let (begun, mut printed) = (clock::boot(), 0);
    loop {
        while let Some(item) = samples.next() {
            let sample = Sample::from_bytes(&item).context("the program is of another version")?;
            drop(item);
            // The buffer keeps the oldest, which may be from last week.
            if !all && Duration::from_nanos(sample.time) < begun {
                continue;
            }
            let row = row(&sample);
            let line = if json {
                serde_json::to_string(&row)?
            } else {
                format!(
                    "{}  {:<39}  {:<10}  {:>5} bytes  {}",
                    row.time, row.source, row.interface, row.bytes, row.verdict
                )
            };
            match writeln!(out, "{line}").and_then(|()| out.flush()) {
                // Whoever reads has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                result => result.context("cannot write to standard output")?,
            }
            printed += 1;
            if most.is_some_and(|most| printed >= most) {
                return Ok(());
            }
        }
        let mut ready = [PollFd::new(
            std::os::fd::AsFd::as_fd(&samples),
            PollFlags::POLLIN,
        )];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => bail!("cannot wait for samples: {error}"),
        }
    }
}

fn row(sample: &Sample) -> Row {
    let age = clock::boot().saturating_sub(Duration::from_nanos(sample.time));
    let now = clock::wall().millis();
    let age = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    let interface = if_indextoname(sample.interface).ok();
    Row {
        time: Timestamp::from_millis(now.saturating_sub(age)),
        source: Ipv6Addr::from(sample.source).to_canonical().to_string(),
        interface: interface
            .and_then(|name| Some(name.to_str().ok()?.to_owned()))
            .unwrap_or_else(|| format!("#{}", sample.interface)),
        bytes: sample.length,
        verdict: match sample.counter {
            counter if counter == Counter::Dropped as u32 => "dropped",
            _ => "would be dropped",
        },
    }
}
