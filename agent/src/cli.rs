//! The command line: what is typed, and what is printed.

mod drops;
mod exchange;
mod explain;
mod history;
mod learn;
mod lines;
mod notify;
mod replay;
mod show;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use portcullis_engine::{
    Subject,
    parse::{Fields, Format},
    time::parse_duration,
};
use serde::Serialize;
use tracing::info;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};

use crate::{
    audit::{self, chain::Hash},
    config::{self, Adjusted, Config, Input, Setting},
    control::{self, AskError, Request},
    doctor,
    enforce::{
        self, Enforcer as _, Mode,
        xdp::{Flavour, Options, Xdp},
    },
    host,
    replay::{
        Plan,
        report::{Facts, Report},
    },
    runtime::{self, AllowRow, BanRow, Banned, Explained, Status},
    store::{self, Store},
};

const AFTER_HELP: &str = "\
Exit codes: 0 done; 1 refused, or failed; 64 wrong usage or configuration; 69 no back end works, or no agent answers; \
75 another agent is running.

Start in observe mode (the default), watch `portcullis status` and `portcullis bans`, then set mode = \"enforce\".";

/// Guards a Linux edge host: learns what normal traffic looks like from Nginx's access log, and drops what leaves it in
/// the network driver.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent in the foreground, until SIGTERM or SIGINT
    ///
    /// Stopping it leaves what stands in force: the kernel goes on dropping banned sources, and ends each ban on time.
    /// `portcullis detach` takes everything out.
    Run(Run),
    /// Show how the agent does: mode, back end, baseline, rate, bans, packets, logs that cannot be read
    Status(Ask),
    /// List the bans that stand, newest first, with their evidence and packet counts
    Bans(Bans),
    /// Say in words why somebody is banned, or is not, and how far from it
    ///
    /// The test that flagged, what it was held against, and where the lines are that it rests on; without a ban, how far it is from
    /// every threshold now, what is on its account, and what keeps it from being banned. An IPv6 address is explained as its /64.
    Explain(Explain),
    /// Follow packets of banned sources as they come in: a sample of them, see `enforce.sample_one_in`
    Drops(Drops),
    /// Ban an address or a prefix
    ///
    /// An allowlisted one is refused. In observe mode the ban is counted, not enforced.
    Ban(Ban),
    /// Let a ban stand that was made with --confirm
    Confirm(Confirm),
    /// Lift a ban, and forget the offences behind it
    Unban(Unban),
    /// Say who is never banned, and change it
    ///
    /// What is changed here is kept across restarts, beside what is configured (`bans.allow`) and what this host itself needs.
    #[command(subcommand)]
    Allow(Allow),
    /// Read the configuration anew, as SIGHUP does
    ///
    /// All of it is checked first; if anything is wrong, the one before goes on to hold. What holds from now on is printed, and what
    /// is only heeded after a restart: the source, the window, table sizes, the back end, the mode, the state.
    Reload(Ask),
    /// Ban everybody on a list: your own export, plain lists, CSV, JSON, what fail2ban and CrowdSec print
    ///
    /// One address, prefix or range a line, `#` begins a comment; CSV with a header that names its columns (subject, ip, address or
    /// value; until, expiration, expires or duration; reason or scenario); JSON of such objects, in an array or one a line.
    /// `fail2ban-client banned`, `fail2ban-client get JAIL banip --with-time`, `fail2ban-client status JAIL`; `cscli decisions
    /// list -o json` or `-o raw`, of which bans of addresses and ranges are taken that are not simulated. They become bans by an
    /// operator, each until the end that the list has for it; where it has none, until it is lifted. Who is banned for as long
    /// already stays as they are, allowlisted ones are refused. What is not understood is said and left out. Exit code 1 if anything
    /// was not understood, refused, or could not be put in force yet.
    Import(exchange::Import),
    /// Print the bans that operators made, in a form that `portcullis import` reads
    ///
    /// For another host, or another program. Of an export, `import` takes subject, end, reason and whether it is only observed; all
    /// become bans by an operator there. JSON is an object a line. A plain list is subjects alone, without their ends.
    Export(exchange::Export),
    /// Attach the XDP program alone to an interface, without an agent, and leave it there
    ///
    /// It drops nothing by itself: an agent with the same pin folder takes it over. To see whether a driver can do it.
    Load(Load),
    /// Take everything of Portcullis out of the kernel: links, maps, chains and sets
    Detach(Configured),
    /// Print a configuration file with every key, its meaning and its default
    Config,
    /// Read logs as the agent would, and say what is in them and what cannot be read
    ///
    /// For a new `log_format`, or to see why lines are malformed. Needs no rights but to read the files.
    Lines(Lines),
    /// Say what the agent would have done with these logs: whom it would have banned, when, why, and for how long
    ///
    /// The same engine, at the time that the lines have. Any number of logs in any order, packed ones too: they are read as one, in
    /// the order of their times. It learns from nothing, so the beginning (`detect.baseline.warm_up_secs`) is held against the ceiling
    /// of the warm-up. Needs no rights but to read the files, and changes nothing. Addresses of this host are banned like any other
    /// here: name those that must not be in bans.allow.
    Replay(Replay),
    /// Learn what is normal from logs that were written, so that the first start knows it already
    ///
    /// Reads as `replay` does, and keeps what it learns (hours of the day, what single clients do, the recent past) where the agent
    /// looks for it: state.dir. Attacks in the logs teach nothing, and no ban or offence comes of them. What is known stays: newer
    /// lines add to it, and older ones teach only hours of which nothing is known. The agent must not run meanwhile.
    Learn(Learn),
    /// Print what is on record of an address or a prefix, of all around it and inside it, oldest first
    ///
    /// From all files of the history; the agent need not run. The form is `[time] ACTION subject | condition | rate | baseline |
    /// duration`.
    History(History),
    /// Look after the record of what was decided
    #[command(subcommand)]
    Audit(Audit),
    /// See whether word reaches people
    #[command(subcommand)]
    Notify(Notify),
    /// Check a configuration file, and say everything that is wrong with it
    Check(Configured),
    /// Look at this host: what stands in the guard's way, and what to do about it
    ///
    /// Among other things it reads the end of each log as the agent would, and looks at Nginx's configuration. Changes nothing; of
    /// the commands that are configured it runs `enforce.nginx.test` alone, and that only while an Nginx with the include runs.
    /// Exit code 1 if anything must be put right.
    Doctor(Doctor),
}

#[derive(Debug, Subcommand)]
enum Notify {
    /// Send a test message to each receiver that is configured: Slack, the webhook
    ///
    /// One attempt each, from here; the agent need not run. Exit code 1 if one of them was not reached or has not taken it, 64 if
    /// none is configured.
    Test(Configured),
}

#[derive(Debug, Args)]
struct Doctor {
    #[command(flatten)]
    configured: Configured,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Configured {
    /// The configuration [default: /etc/portcullis/portcullis.toml if it is there, else built-in defaults]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Lines {
    /// Logs, also packed (gzip, zstd, xz); `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// In place of source.format: auto, json, combined or a `log_format` of Nginx
    #[arg(long)]
    format: Option<String>,
    /// Print each record as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    configured: Configured,
}

#[derive(Debug, Args)]
struct Replay {
    /// Logs, also packed (gzip, zstd, xz); `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A key of the configuration and its value, in place of what the file says, such as `detect.z_score=4`; may be given several
    /// times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// In place of source.format: auto, json, combined or a `log_format` of Nginx
    #[arg(long)]
    format: Option<String>,
    /// Print decisions as JSON, one object a line, and no summary
    #[arg(long)]
    json: bool,
    /// Write a page with plots of traffic, clients and bans there, for a browser
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    configured: Configured,
}

#[derive(Debug, Args)]
struct Learn {
    /// Logs, also packed (gzip, zstd, xz); `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A key of the configuration and its value, in place of what the file says, such as `state.dir=/tmp/p`; may be given several
    /// times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// In place of source.format: auto, json, combined or a `log_format` of Nginx
    #[arg(long)]
    format: Option<String>,
    #[command(flatten)]
    configured: Configured,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    configured: Configured,
    /// Nginx's access log, in place of source.log; may be given several times
    #[arg(long = "log", value_name = "FILE")]
    logs: Vec<PathBuf>,
    /// An interface to guard, in place of enforce.interfaces; may be given several times
    #[arg(long = "interface", value_name = "IFACE")]
    interfaces: Vec<String>,
    /// In place of mode
    #[arg(long, value_enum)]
    mode: Option<ModeArg>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeArg {
    /// Count packets of banned sources, and let them pass
    Observe,
    /// Drop them
    Enforce,
}

#[derive(Debug, Args)]
struct Ask {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Debug, Args)]
struct Bans {
    /// In this order
    #[arg(long, value_enum, value_name = "ORDER", default_value_t = show::Order::Since)]
    sort: show::Order,
    #[command(flatten)]
    ask: Ask,
}

#[derive(Debug, Args)]
struct Explain {
    /// `192.0.2.1`, `2001:db8::1`, `192.0.2.0/24` …
    subject: Subject,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Debug, Args)]
struct History {
    /// `192.0.2.1`, `2001:db8::1`, `192.0.2.0/24` …
    subject: Subject,
    /// Print the lines as they are in the files, JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    configured: Configured,
}

#[derive(Debug, Subcommand)]
enum Audit {
    /// Say whether the history is as it was written: nothing changed, removed, moved
    ///
    /// Each line holds a hash over the one before and itself, and history.head the newest of them. That needs no key: whoever may
    /// write the files can forge them all. So write the head that this prints down elsewhere, and give it as --head later. Lines that
    /// a crash has torn, and files that were rotated away, are no breaks. Exit code 1 if there is a break.
    Verify(Verify),
}

#[derive(Debug, Args)]
struct Verify {
    /// Files, oldest first [default: all of state.dir, against its history.head]
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A head that was printed once: everything up to it must be there as it was
    #[arg(long, value_name = "HEX", value_parser = parse_hash)]
    head: Option<Hash>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    configured: Configured,
}

#[derive(Debug, Args)]
struct Drops {
    /// Stop after so many
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Begin with those that came before and were never shown, the first of them
    #[arg(long)]
    all: bool,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
    /// Where maps and links are pinned
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/portcullis")]
    pin_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Reach {
    /// The agent's control socket
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/portcullis/control.sock"
    )]
    socket: PathBuf,
}

#[derive(Debug, Args)]
struct Ban {
    /// `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/64` …
    subject: Subject,
    /// For how long: 90s, 10m, 2h, 1d … [default: until it is lifted]
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_length)]
    length: Option<Duration>,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT", default_value = "by an operator")]
    reason: String,
    /// Only count what it would drop, whatever the mode; `portcullis bans` shows how much that is
    #[arg(long)]
    observe: bool,
    /// Lift it again after so long, unless `portcullis confirm` says that it may stand: for bans that may cut off whoever makes them
    #[arg(long, value_name = "DURATION", value_parser = parse_length)]
    confirm: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Debug, Args)]
struct Confirm {
    /// As `portcullis bans` shows it
    subject: Subject,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Debug, Subcommand)]
enum Allow {
    /// Put an address or a network on the allowlist; bans of what is in it are lifted
    Add {
        /// `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/48` …
        #[arg(value_parser = parse_net)]
        net: IpNet,
        /// Why; goes on record
        #[arg(long, value_name = "TEXT", default_value = "by an operator")]
        reason: String,
        #[command(flatten)]
        reach: Reach,
    },
    /// Take off what was put on by `allow add`
    Remove {
        /// As `allow list` shows it
        #[arg(value_parser = parse_net)]
        net: IpNet,
        #[command(flatten)]
        reach: Reach,
    },
    /// Show who is never banned, and why
    List(Ask),
    /// Say whether an address or a network can be banned; exit code 1 if it can
    Check {
        /// Which
        subject: Subject,
        #[command(flatten)]
        reach: Reach,
    },
}

#[derive(Debug, Args)]
struct Unban {
    /// As `portcullis bans` shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    subject: Option<Subject>,
    /// Lift every ban
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Debug, Args)]
struct Load {
    /// The interface
    #[arg(long, value_name = "IFACE")]
    interface: String,
    /// Where in the receive path
    #[arg(long, value_enum, default_value_t = LoadMode::Auto)]
    mode: LoadMode,
    /// Where maps and link are pinned
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/portcullis")]
    pin_dir: PathBuf,
    /// Take it off again instead
    #[arg(long)]
    detach: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoadMode {
    /// Native if the driver can, else generic
    Auto,
    /// In the driver
    Native,
    /// In the kernel's generic receive path
    Generic,
}

/// Wrong usage or configuration, as in sysexits.h.
const USAGE: u8 = 64;
/// No back end works, or nobody answers.
const UNAVAILABLE: u8 = 69;
/// Another agent is running.
const BUSY: u8 = 75;

/// Does what the command line says.
#[must_use]
#[expect(clippy::too_many_lines, reason = "one verb after the other")]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            return match error.print() {
                Ok(()) => code.into(),
                Err(_) => ExitCode::FAILURE,
            };
        }
    };
    let result = match cli.verb {
        Verb::Run(run) => agent(run),
        Verb::Status(Ask { json, reach }) => {
            ask(&reach.socket, &Request::Status, json, |status: &Status| {
                show::status(status)
            })
        }
        Verb::Bans(Bans { sort, ask }) => {
            fetch(&ask.reach.socket, &Request::Bans).and_then(|mut bans: Vec<BanRow>| {
                sort.sort(&mut bans);
                present(&bans, ask.json, |bans| show::bans(bans))
            })
        }
        Verb::Explain(Explain {
            subject,
            json,
            reach,
        }) => ask(
            &reach.socket,
            &Request::Explain { subject },
            json,
            explain::words,
        ),
        Verb::Drops(Drops {
            count,
            all,
            json,
            pin_dir,
        }) => drops::follow(&pin_dir, count, all, json, &mut io::stdout().lock())
            .map_err(Failure::from),
        Verb::Ban(ban) => banned(ban),
        Verb::Confirm(Confirm {
            subject,
            json,
            reach,
        }) => {
            let request = Request::Confirm { subject };
            ask(&reach.socket, &request, json, |banned: &Banned| {
                show::banned(subject, banned)
            })
        }
        Verb::Allow(allow) => match allowed(allow) {
            Ok(true) => Ok(()),
            // That it can be banned has been said.
            Ok(false) => return ExitCode::FAILURE,
            Err(failure) => Err(failure),
        },
        Verb::Unban(unban) => {
            let request = unban
                .subject
                .map_or(Request::UnbanAll, |subject| Request::Unban { subject });
            ask(
                &unban.reach.socket,
                &request,
                unban.json,
                |lifted: &usize| match lifted {
                    1 => "1 ban lifted\n".to_owned(),
                    lifted => format!("{lifted} bans lifted\n"),
                },
            )
        }
        Verb::Reload(Ask { json, reach }) => {
            ask(&reach.socket, &Request::Reload, json, show::reloaded)
        }
        Verb::Load(load) => load_alone(&load),
        Verb::Detach(configured) => detach(&configured),
        Verb::Lines(lines) => read_lines(&lines),
        Verb::Replay(replay) => replayed(replay),
        Verb::Learn(wanted) => learnt(wanted),
        Verb::History(wanted) => configuration(&wanted.configured).and_then(|config| {
            let mut out = io::BufWriter::new(io::stdout().lock());
            let printed = history::print(&config.state_dir, wanted.subject, wanted.json, &mut out);
            match printed.and_then(|()| Ok(out.flush()?)) {
                // Whoever reads has seen enough.
                Err(error) if is_broken_pipe(&error) => Ok(()),
                result => Ok(result?),
            }
        }),
        Verb::Audit(Audit::Verify(wanted)) => match verified(&wanted) {
            Ok(true) => Ok(()),
            // What is broken has been said.
            Ok(false) => return ExitCode::FAILURE,
            Err(failure) => Err(failure),
        },
        Verb::Notify(Notify::Test(configured)) => {
            match configuration(&configured).and_then(|config| notify::test(&config)) {
                Ok(true) => Ok(()),
                // Who was not told, and why, has been said.
                Ok(false) => return ExitCode::FAILURE,
                Err(failure) => Err(failure),
            }
        }
        Verb::Config => print(&config::documentation()),
        Verb::Check(configured) => {
            configuration(&configured).and_then(|_| print("the configuration is fine\n"))
        }
        Verb::Export(wanted) => exchange::export(&wanted),
        Verb::Import(wanted) => match exchange::import(&wanted) {
            Ok(true) => Ok(()),
            // What is wrong has been said.
            Ok(false) => return ExitCode::FAILURE,
            Err(failure) => Err(failure),
        },
        Verb::Doctor(doctor) => match examine(&doctor) {
            Ok(true) => Ok(()),
            // What is wrong has been said.
            Ok(false) => return ExitCode::FAILURE,
            Err(failure) => Err(failure),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, error)) => {
            eprintln!("portcullis: {error:#}");
            code.into()
        }
    }
}

fn banned(ban: Ban) -> Result<(), Failure> {
    let request = Request::Ban {
        subject: ban.subject,
        secs: ban.length.map(|length| length.as_secs()),
        reason: ban.reason,
        observe: ban.observe,
        confirm_secs: ban.confirm.map(|within| within.as_secs()),
    };
    ask(&ban.reach.socket, &request, ban.json, |banned: &Banned| {
        show::banned(ban.subject, banned)
    })
}

/// What the allowlist has to say; `false` for whoever can be banned.
fn allowed(allow: Allow) -> Result<bool, Failure> {
    match allow {
        Allow::Add { net, reason, reach } => {
            let request = Request::Allow { net, reason };
            ask(
                &reach.socket,
                &request,
                false,
                |lifted: &usize| match lifted {
                    0 => format!("{net} is never banned from now on\n"),
                    1 => format!("{net} is never banned from now on; 1 ban lifted\n"),
                    lifted => format!("{net} is never banned from now on; {lifted} bans lifted\n"),
                },
            )
        }
        Allow::Remove { net, reach } => {
            let request = Request::Disallow { net };
            ask(
                &reach.socket,
                &request,
                false,
                |still: &Option<IpNet>| match still {
                    Some(entry) => format!(
                        "{net} is taken off, and still never banned: {entry} is on the allowlist\n"
                    ),
                    None => format!("{net} may be banned again\n"),
                },
            )
        }
        Allow::List(Ask { json, reach }) => {
            let rows = |rows: &Vec<AllowRow>| show::allowlist(rows);
            ask(&reach.socket, &Request::Allowlist, json, rows)
        }
        Allow::Check { subject, reach } => {
            let mut is_allowed = false;
            let request = Request::Explain { subject };
            ask(&reach.socket, &request, false, |explained: &Explained| {
                is_allowed = explained
                    .known
                    .spared
                    .as_ref()
                    .is_some_and(|spared| spared.is_whole);
                show::spared(subject, explained)
            })?;
            return Ok(is_allowed);
        }
    }?;
    Ok(true)
}

fn parse_net(text: &str) -> Result<IpNet, String> {
    let subject = text.parse::<Subject>();
    subject.map(Subject::net).map_err(|error| error.to_string())
}

fn parse_length(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Ok(length) if length < Duration::from_secs(1) => Err("must be at least 1s".to_owned()),
        length => length,
    }
}

fn parse_hash(text: &str) -> Result<Hash, String> {
    let hash = Hash::read(text.trim().to_lowercase().as_bytes());
    hash.ok_or_else(|| "must be 64 hexadecimal digits".to_owned())
}

/// An exit code and what is said with it.
struct Failure(u8, anyhow::Error);

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self(1, error)
    }
}

fn configuration(configured: &Configured) -> Result<Config, Failure> {
    Ok(adjusted(configured, &[])?.config)
}

/// The configuration, with single settings in place of what it says.
fn adjusted(configured: &Configured, settings: &[Setting]) -> Result<Adjusted, Failure> {
    loaded(&Input::new(configured.config.clone(), settings.to_vec()))
}

fn loaded(input: &Input) -> Result<Adjusted, Failure> {
    input.load().map_err(|problems| {
        Failure(
            USAGE,
            anyhow::anyhow!("the configuration is refused:\n{problems}"),
        )
    })
}

fn agent(run: Run) -> Result<(), Failure> {
    let mut settings = Vec::new();
    if !run.logs.is_empty() {
        let absolute = run.logs.into_iter().map(std::path::absolute);
        let absolute: Vec<PathBuf> = absolute.collect::<Result<_, _>>().context("--log")?;
        let logs = absolute.iter().map(|path| path.display().to_string());
        settings.push(Setting::list("--log", "source.log", logs.collect()));
    }
    if !run.interfaces.is_empty() {
        settings.push(Setting::list(
            "--interface",
            "enforce.interfaces",
            run.interfaces,
        ));
    }
    if let Some(mode) = run.mode {
        let mode = match mode {
            ModeArg::Observe => "observe",
            ModeArg::Enforce => "enforce",
        };
        settings.push(Setting::text("--mode", "mode", mode));
    }
    // Wherever the agent is by then, it is to be found again.
    let path = run.configured.config.map(std::path::absolute);
    let input = Input::new(path.transpose().context("--config")?, settings);
    let adjusted = loaded(&input)?;
    let _log = log();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(runtime::run(adjusted, input));
    // The thread that reads the log may be in the middle of a read of a hung file system.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result.map_err(|error| {
        let text = error.to_string();
        let code = if text.starts_with("another agent") {
            BUSY
        } else if text.starts_with("no back end works") {
            UNAVAILABLE
        } else {
            1
        };
        Failure(code, error)
    })
}

fn read_lines(wanted: &Lines) -> Result<(), Failure> {
    let config = configuration(&wanted.configured)?;
    let format = match &wanted.format {
        None => config.engine.format,
        Some(text) => Format::new(text, Fields::default())
            .map_err(|problem| Failure(USAGE, anyhow::anyhow!("--format: {problem}")))?,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let max_line = config.source.limits.max_line;
    let read = lines::read(&wanted.files, &format, max_line, wanted.json, &mut out);
    let read = read.and_then(|()| Ok(out.flush()?));
    match read {
        // Whoever reads has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => Ok(result?),
    }
}

fn replayed(wanted: Replay) -> Result<(), Failure> {
    let mut settings = wanted.settings;
    let format = wanted.format.as_deref();
    settings.extend(format.map(|text| Setting::text("--format", "source.format", text)));
    let Adjusted { config, differing } = adjusted(&wanted.configured, &settings)?;
    let report = wanted.report.as_deref().map(|path| {
        let files = wanted.files.iter();
        let facts = Facts {
            files: files.map(|file| file.display().to_string()).collect(),
            differing,
            z_score: config.engine.detect.ordinary.z_score,
        };
        Report::new(path, facts)
    });
    let mut report = report.transpose()?;
    let plan = Plan {
        files: wanted.files,
        format: config.source.format,
        max_line: config.source.limits.max_line,
        settings: config.engine,
    };
    let out = io::BufWriter::new(io::stdout().lock());
    match replay::print(&plan, report.as_mut(), wanted.json, out) {
        // Whoever reads has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => Ok(result?),
    }
}

fn learnt(wanted: Learn) -> Result<(), Failure> {
    let mut settings = wanted.settings;
    let format = wanted.format.as_deref();
    settings.extend(format.map(|text| Setting::text("--format", "source.format", text)));
    let Adjusted { config, .. } = adjusted(&wanted.configured, &settings)?;
    let mut engine = config.engine;
    if config.surroundings.host {
        let host = host::protected().into_iter();
        engine.allow.extend(host.map(|(net, _)| net));
    }
    let plan = Plan {
        files: wanted.files,
        format: config.source.format,
        max_line: config.source.limits.max_line,
        settings: engine,
    };
    let _log = log();
    let (store, contents) = Store::open(&config.state_dir).map_err(busy)?;
    let known = contents.saved.baseline;
    let summary = learn::learn(&plan, known, &store, &config.state_dir)?;
    print(&summary)
}

/// Looks at the history; says whether it is unbroken.
fn verified(wanted: &Verify) -> Result<bool, Failure> {
    let report = if wanted.files.is_empty() {
        let config = configuration(&wanted.configured)?;
        audit::verify::folder(&config.state_dir, wanted.head)?
    } else {
        audit::verify::files(&wanted.files, wanted.head)?
    };
    if wanted.json {
        let text = serde_json::to_string_pretty(&report)
            .context("the report cannot be written as JSON")?;
        print(&format!("{text}\n"))?;
    } else {
        print(&history::verdict(&report))?;
    }
    Ok(report.is_unbroken())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Looks at the host; says whether nothing must be put right.
fn examine(doctor: &Doctor) -> Result<bool, Failure> {
    let checks = doctor::run(&configuration(&doctor.configured)?);
    if doctor.json {
        let text = serde_json::to_string_pretty(&checks)
            .context("the checks cannot be written as JSON")?;
        print(&format!("{text}\n"))?;
    } else {
        print(&doctor::show(&checks))?;
    }
    Ok(doctor::is_sound(&checks))
}

/// Messages that may wait to be written.
const WAITING_MESSAGES: usize = 16_384;

/// Messages go to standard error; under systemd without the time, which the journal has. They are written by a thread
/// of their own: whoever does not read them holds up nobody, and misses some. The guard writes the rest when dropped.
fn log() -> WorkerGuard {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PORTCULLIS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Below that they name the hosts of webhooks, which are nobody's business.
    let quiet = ["reqwest=warn", "hyper_util=warn"]
        .into_iter()
        .flat_map(str::parse);
    let filter = quiet.fold(filter, tracing_subscriber::EnvFilter::add_directive);
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_MESSAGES)
        .finish(io::stderr());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_target(false);
    let is_terminal = io::IsTerminal::is_terminal(&io::stderr());
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.without_time().with_ansi(false).init();
    } else {
        builder.with_ansi(is_terminal).init();
    }
    guard
}

fn ask<T: serde::de::DeserializeOwned + Serialize>(
    socket: &Path,
    request: &Request,
    json: bool,
    show: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    present(&fetch(socket, request)?, json, show)
}

fn fetch<T: serde::de::DeserializeOwned>(socket: &Path, request: &Request) -> Result<T, Failure> {
    control::ask(socket, request).map_err(|error| match error {
        AskError::Unreachable(error) => Failure(UNAVAILABLE, error),
        AskError::Refused(why) => Failure(1, anyhow::anyhow!(why)),
    })
}

fn present<T: Serialize>(
    answer: &T,
    json: bool,
    show: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    if json {
        let text =
            serde_json::to_string_pretty(answer).context("the answer cannot be written as JSON")?;
        print(&format!("{text}\n"))
    } else {
        print(&show(answer))
    }
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough: `portcullis bans | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result.context("cannot write to standard output")?),
    }
}

fn load_alone(load: &Load) -> Result<(), Failure> {
    let _lock = lock(&load.pin_dir)?;
    if load.detach {
        let found = enforce::xdp::remove_leftovers(&load.pin_dir)?;
        return print(if found {
            "detached\n"
        } else {
            "nothing was attached\n"
        });
    }
    let _log = log();
    let options = Options {
        interfaces: vec![load.interface.clone()],
        pin_dir: load.pin_dir.clone(),
        max_bans: u32::try_from(Config::default().engine.max_bans).unwrap_or(u32::MAX),
        sample_one_in: Config::default().enforce.sample_one_in,
    };
    let flavours: &[Flavour] = match load.mode {
        LoadMode::Auto => &[Flavour::Native, Flavour::Generic],
        LoadMode::Native => &[Flavour::Native],
        LoadMode::Generic => &[Flavour::Generic],
    };
    let mut last = None;
    for flavour in flavours {
        let attached = Xdp::open(&options, *flavour, Mode::Observe).and_then(|mut xdp| {
            xdp.activate()?;
            Ok(xdp)
        });
        match attached {
            Ok(xdp) => {
                let text = format!(
                    "{} is attached to {}, observe mode; pinned under {}; take it off with --detach\n",
                    xdp.backend(),
                    xdp.place(),
                    load.pin_dir.display()
                );
                return print(&text);
            }
            Err(error) => {
                info!("{error:#}");
                last = Some(error);
            }
        }
    }
    Err(Failure(
        UNAVAILABLE,
        last.unwrap_or_else(|| anyhow::anyhow!("no mode to try")),
    ))
}

/// Keeps an agent from working with the pins, and tells one that does.
fn lock(pin_dir: &Path) -> Result<Option<enforce::xdp::Lock>, Failure> {
    enforce::xdp::lock(pin_dir).map_err(busy)
}

fn busy(error: anyhow::Error) -> Failure {
    if error.to_string().starts_with("another agent") {
        Failure(BUSY, error.context("stop the agent first"))
    } else {
        Failure(1, error)
    }
}

fn detach(configured: &Configured) -> Result<(), Failure> {
    let config = configuration(configured)?;
    // An agent would put everything back at once.
    let _lock = lock(&config.enforce.pin_dir)?;
    let _state = store::lock(&config.state_dir).map_err(busy)?;
    let mut removed = enforce::remove_all(&config.enforce)?;
    if let Some(nginx) = &config.nginx
        && enforce::nginx::clear(nginx)?
    {
        removed.push(format!("bans in {}", nginx.include.display()));
    }
    if removed.is_empty() {
        return print("nothing of Portcullis was in the kernel\n");
    }
    print(&format!("taken out: {}\n", removed.join("; ")))
}
