//! Many requests: clients that come as they please, and an attacker that does not stop.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use fastrand::Rng;

use super::{Lab, client, clock};

/// No traffic outlives this, whatever becomes of its owner.
const LIMIT: Duration = Duration::from_mins(5);
/// How soon a thread notices that it is to stop.
const STEP: Duration = Duration::from_millis(20);
/// Time-out of a legitimate client: far above anything but a ban.
const PATIENT: Duration = Duration::from_secs(3);
/// Time-out of an attacker: below the first retransmission, so that a request that is dropped is about one packet.
const IMPATIENT: Duration = Duration::from_millis(500);

/// Requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Answered, with a status below 500.
    pub answered: u64,
    /// Not answered.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answered: AtomicU64,
    failed: AtomicU64,
    first_request: OnceLock<(Instant, u64)>,
    first_failure: Mutex<Option<String>>,
}

impl Shared {
    fn request(&self, source: IpAddr, path: &str, timeout: Duration) {
        self.first_request
            .get_or_init(|| (clock::now(), clock::epoch_millis()));
        let failure = match client::get(source, path, timeout) {
            Ok(status) if status < 500 => {
                self.answered.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Ok(status) => format!("{source}: status {status}"),
            Err(error) => format!("{source}: {error}"),
        };
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.first_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(failure);
    }

    /// Sleeps until a moment; `false` if it is time to stop.
    fn sleep_until(&self, due: Instant, end: Instant) -> bool {
        loop {
            let now = clock::now();
            if self.stop.load(Ordering::Relaxed) || now >= end {
                return false;
            }
            let left = due.saturating_duration_since(now);
            if left.is_zero() {
                return true;
            }
            thread::sleep(left.min(STEP));
        }
    }
}

/// Requests that go on until they are stopped, or this is dropped.
#[derive(Debug)]
pub struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// Legitimate clients, each with Poisson arrivals at `rate` requests a second. The same seed gives the same
    /// arrivals.
    ///
    /// # Errors
    /// When a thread cannot enter the clients' namespace.
    pub fn legitimate(lab: &Lab, clients: &[IpAddr], rate: f64, seed: u64) -> Result<Self> {
        let mut traffic = Self::silent();
        let end = clock::now() + LIMIT;
        for (number, source) in (0..).zip(clients.iter().copied()) {
            let mut random = Rng::with_seed(seed.wrapping_add(number));
            traffic.thread(lab, move |shared| {
                let mut due = clock::now();
                loop {
                    // Exponential gaps; 1 − u is in (0, 1].
                    due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
                    if !shared.sleep_until(due, end) {
                        return;
                    }
                    shared.request(source, "/", PATIENT);
                }
            })?;
        }
        Ok(traffic)
    }

    /// An attacker that makes `rate` requests a second, evenly spaced, whether or not it is answered. Its requests come
    /// from the given addresses in turn.
    ///
    /// # Errors
    /// When a thread cannot enter the clients' namespace.
    pub fn attack(lab: &Lab, sources: &[IpAddr], path: &'static str, rate: f64) -> Result<Self> {
        let mut traffic = Self::silent();
        // Enough threads for the rate to hold while every request times out.
        let mut threads = 1_u32;
        while f64::from(threads) < rate * (IMPATIENT.as_secs_f64() + 0.1) {
            threads += 1;
        }
        let start = clock::now();
        let gap = Duration::from_secs_f64(1.0 / rate);
        for first in 0..threads {
            let sources = sources.to_vec();
            traffic.thread(lab, move |shared| {
                let mut number = first;
                while let Some(source) = sources.get(number as usize % sources.len().max(1))
                    && shared.sleep_until(start + gap * number, start + LIMIT)
                {
                    shared.request(*source, path, IMPATIENT);
                    number += threads;
                }
            })?;
        }
        Ok(traffic)
    }

    /// As much as Nginx can answer: each source on a thread of its own sends a hundred requests at a time.
    ///
    /// # Errors
    /// When a thread cannot enter the clients' namespace.
    pub fn load(lab: &Lab, sources: &[IpAddr]) -> Result<Self> {
        const AT_A_TIME: usize = 100;
        let mut traffic = Self::silent();
        let end = clock::now() + LIMIT;
        for source in sources.iter().copied() {
            traffic.thread(lab, move |shared| {
                while !shared.stop.load(Ordering::Relaxed) && clock::now() < end {
                    let answered = client::get_many(source, AT_A_TIME, PATIENT).unwrap_or(0);
                    shared
                        .answered
                        .fetch_add(answered as u64, Ordering::Relaxed);
                    let failed = AT_A_TIME - answered;
                    shared.failed.fetch_add(failed as u64, Ordering::Relaxed);
                }
            })?;
        }
        Ok(traffic)
    }

    fn silent() -> Self {
        Self {
            shared: Arc::default(),
            threads: Vec::new(),
        }
    }

    fn thread(&mut self, lab: &Lab, job: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let (lab, shared) = (lab.clone(), Arc::clone(&self.shared));
        let (entered, told) = std::sync::mpsc::channel();
        self.threads.push(thread::spawn(move || {
            let inside = lab.world().enter();
            // The laboratory may be taken down only by its owner.
            drop(lab);
            let go = inside.is_ok();
            if entered.send(inside).is_ok() && go {
                job(&shared);
            }
        }));
        told.recv()?
    }

    /// Requests so far.
    #[must_use]
    pub fn count(&self) -> Count {
        Count {
            answered: self.shared.answered.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
        }
    }

    /// When the first request was made: for measuring, and in milliseconds since the epoch.
    #[must_use]
    pub fn first_request(&self) -> Option<(Instant, u64)> {
        self.shared.first_request.get().copied()
    }

    /// What went wrong first.
    #[must_use]
    pub fn first_failure(&self) -> Option<String> {
        self.shared
            .first_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends it and waits for what is under way.
    #[must_use]
    pub fn stop(mut self) -> Count {
        self.halt();
        self.count()
    }

    fn halt(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.halt();
    }
}
