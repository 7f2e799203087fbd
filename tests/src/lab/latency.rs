//! How long it takes from a line in the log to an entry in the kernel's map.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{
    agent::{Agent, figure},
    clock,
    kernel::{BansV4, entry},
    log::{self, Appender},
    wait::check_interrupt,
};

/// Far more than any target: an entry that is not there by then is missing.
const MISSING: Duration = Duration::from_secs(1);
/// Offenders that may be set aside because the baseline moved while they were prepared.
const MAX_MOVED: usize = 100;

/// What was measured, one figure an offender, shortest first.
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    sorted: Vec<Duration>,
    /// Offenders that were set aside: the baseline had moved, so another line than the measured one flagged them.
    pub moved: usize,
}

impl Latencies {
    /// Number of samples.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.sorted.len()
    }

    /// A percentile by nearest rank; 100 is the longest. Zero without samples.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted.get(rank - 1).copied().unwrap_or_default()
    }
}

/// Makes offenders out of `sources`, one after the other, until there are `samples` figures. Each gets all but the last
/// of the lines that it takes to be flagged; the time runs from just before the last one's write(2) until the entry
/// is seen in the pinned map.
///
/// # Errors
/// When an offender is not banned within a second, or too few sources are given.
pub fn measure(
    agent: &Agent,
    bans: &BansV4,
    log: &mut Appender,
    sources: impl IntoIterator<Item = IpAddr>,
    samples: usize,
) -> Result<Latencies> {
    let mut latencies = Latencies::default();
    let mut sources = sources.into_iter();
    while latencies.sorted.len() < samples {
        check_interrupt()?;
        let Some(IpAddr::V4(source)) = sources.next() else {
            bail!("too few IPv4 sources for {samples} samples");
        };
        let key = source.octets();
        let before = agent.status()?;
        let needed = needed(agent, &before)?;
        let lines = figure(&before, "/engine/totals/lines")?;
        log.requests(source.into(), needed - 1)?;
        agent.eventually(
            "the agent to have read all but the last line",
            MISSING * 5,
            || {
                let read = figure(&agent.status()?, "/engine/totals/lines")?;
                Ok((read >= lines + needed - 1).then_some(()))
            },
        )?;

        let mut seen = None;
        let early = entry(bans, key)?.is_some();
        if !early {
            let last = log::line(source.into(), 200);
            let start = clock::now();
            log.append(last.as_bytes())?;
            while seen.is_none() && clock::since(start) < MISSING {
                if entry(bans, key)?.is_some() {
                    seen = Some(clock::since(start));
                }
            }
        }
        match seen {
            Some(latency) => latencies.sorted.push(latency),
            None if early || self::needed(agent, &agent.status()?)? != needed => {
                latencies.moved += 1;
                if latencies.moved > MAX_MOVED {
                    bail!("the baseline does not keep still: {MAX_MOVED} offenders were set aside");
                }
                // What is flagged leaves the baseline; what is not would stay in it.
                log.requests(source.into(), needed)?;
            }
            None => {
                bail!(
                    "{source} is not in the map a second after its line no. {needed}\n{}",
                    agent.evidence()
                );
            }
        }
    }
    latencies.sorted.sort_unstable();
    Ok(latencies)
}

/// Requests in a window that flag a client whose answers do not fail, as of this status.
fn needed(agent: &Agent, status: &Value) -> Result<u64> {
    let normal = status
        .pointer("/engine/normal")
        .context("no /engine/normal in the status")?;
    let number = |key| {
        normal[key]
            .as_f64()
            .with_context(|| format!("no number {key} in {normal}"))
    };
    let config = agent.config();
    let rate = if normal["learnt"] == "warm_up" {
        config.warm_up_ceiling_rps
    } else {
        let (mean, stddev) = (number("mean")?, number("stddev")?);
        // z_score and times_mean of the configuration.
        (mean + 3.0 * stddev).min(5.0 * mean)
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive count of lines"
    )]
    let allowed = (rate * f64::from(config.window_secs)).floor() as u64;
    Ok(allowed + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let sorted = (1..=200).map(Duration::from_millis).collect();
        let latencies = Latencies { sorted, moved: 0 };
        let millis = |percent| latencies.percentile(percent).as_millis();
        assert_eq!((millis(50), millis(99), millis(100)), (100, 198, 200));
        assert_eq!(Latencies::default().percentile(99), Duration::ZERO);
    }
}
