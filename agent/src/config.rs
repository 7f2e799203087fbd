//! The configuration: TOML in, checked types out, every problem at once.
//!
//! Each key is declared once, with its default, its range and its meaning; the documented default file
//! ([`documentation`]) is made from the same declarations.

mod reader;
mod setting;

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use portcullis_engine::{
    Proxied, Release, Settings as Engine, Subject, baseline, blast, caps, cusum, detect, failures,
    ledger::Length,
    parse::{Fields, Format},
    time::parse_duration,
};

pub use self::setting::{Setting, default_of};
use self::{reader::Reader, setting::differing};
use crate::{
    audit,
    enforce::{Backend, Mode, nginx},
    notify::{self, slack, webhook},
    source::{self, Limits, Start, syslog},
    surroundings,
};

/// Everything that can be configured.
#[derive(Clone, Debug)]
pub struct Config {
    /// What happens to banned sources.
    pub mode: Mode,
    /// Where the logs are and how they are read.
    pub source: source::Settings,
    /// What the engine goes by. Its allowlist holds only what is written in the file.
    pub engine: Engine,
    /// Who is on the allowlist by what is around this host.
    pub surroundings: surroundings::Settings,
    /// Domains whose crawlers are not banned, once they have proved to be theirs.
    pub crawlers: Vec<String>,
    /// How bans are put in force.
    pub enforce: Enforce,
    /// How those of clients behind a proxy are.
    pub nginx: Option<nginx::Settings>,
    /// Slack, where it is to be told.
    pub slack: Option<slack::Settings>,
    /// A generic webhook, where one is to be told.
    pub webhook: Option<webhook::Settings>,
    /// Folder of the ledger and the history.
    pub state_dir: PathBuf,
    /// How much history is kept.
    pub history: audit::Settings,
    /// The control socket.
    pub control: Control,
}

/// How bans are put in force.
#[derive(Clone, Debug)]
pub struct Enforce {
    /// Interfaces to guard; empty: that of the default route.
    pub interfaces: Vec<String>,
    /// Back ends, in the order in which they are tried.
    pub backends: Vec<Backend>,
    /// Where XDP pins its maps and links.
    pub pin_dir: PathBuf,
    /// Are the connections that a source has ended when it is banned?
    pub end_connections: bool,
    /// `portcullis drops` is told of one packet in so many of banned sources; 0: of none.
    pub sample_one_in: u32,
    /// How often the kernel is compared with the ledger.
    pub reconcile: Duration,
    /// How often it is seen to that the back end is in the packets' way.
    pub repair: Duration,
}

/// The control socket.
#[derive(Clone, Debug)]
pub struct Control {
    /// Its path.
    pub socket: PathBuf,
    /// The group that may use it besides root.
    pub group: Option<String>,
}

/// Everything that is wrong with a configuration, one sentence each.
#[derive(Debug)]
pub struct Problems(pub Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}

/// Where the configuration is looked for when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/portcullis/portcullis.toml";

impl Config {
    fn of_file(path: &Path, text: &str) -> Result<Self, Problems> {
        Self::parse(text).map_err(|Problems(all)| {
            Problems(
                all.into_iter()
                    .map(|problem| format!("{}: {problem}", path.display()))
                    .collect(),
            )
        })
    }

    /// Reads a file, or takes the defaults where there is none, and puts settings in place of what it says.
    ///
    /// # Errors
    /// All [`Problems`] at once.
    pub fn load_with(path: Option<&Path>, settings: &[Setting]) -> Result<Adjusted, Problems> {
        let text = path.map(read).transpose()?;
        Self::adjusted(path.zip(text.as_deref()), settings)
    }

    fn adjusted(file: Option<(&Path, &str)>, settings: &[Setting]) -> Result<Adjusted, Problems> {
        // What is wrong with the file itself is said of the file.
        if let Some((path, text)) = file {
            Self::of_file(path, text)?;
        }
        let mut table = table(file.map_or("", |(_, text)| text))?;
        let mut problems = Vec::new();
        for setting in settings {
            problems.extend(setting.apply(&mut table).err());
        }
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        let differing = differing(&table);
        match Self::declared(table) {
            Ok(config) => Ok(Adjusted { config, differing }),
            Err(Problems(all)) => Err(Problems(
                all.into_iter()
                    .map(|problem| setting::blamed(settings, problem))
                    .collect(),
            )),
        }
    }

    /// Reads a text.
    ///
    /// # Errors
    /// All [`Problems`] at once.
    pub fn parse(text: &str) -> Result<Self, Problems> {
        Self::declared(table(text)?)
    }

    fn declared(table: toml::Table) -> Result<Self, Problems> {
        let mut reader = Reader::new(table);
        let config = declare(&mut reader);
        check(&config, &mut reader);
        match reader.finish() {
            (problems, _) if problems.is_empty() => Ok(config),
            (problems, _) => Err(Problems(problems)),
        }
    }
}

fn read(path: &Path) -> Result<String, Problems> {
    std::fs::read_to_string(path).map_err(|error| {
        Problems(vec![format!(
            "cannot read {}: {error} (`portcullis config` prints a documented one to start from)",
            path.display()
        )])
    })
}

fn table(text: &str) -> Result<toml::Table, Problems> {
    text.parse::<toml::Table>()
        .map_err(|error| Problems(vec![error.to_string().trim().to_owned()]))
}

/// A configuration with single settings put in place of what the file says.
#[derive(Clone, Debug)]
pub struct Adjusted {
    /// What holds.
    pub config: Config,
    /// Keys that are not what they are by default, by their dotted names, with their values as TOML.
    pub differing: Vec<(String, String)>,
}

/// Where a configuration comes from, so that it can be read again.
#[derive(Clone, Debug, Default)]
pub struct Input {
    path: Option<PathBuf>,
    settings: Vec<Setting>,
}

impl Input {
    /// This file, or the usual one if there is one now, and what was given in place of what it says.
    #[must_use]
    pub fn new(path: Option<PathBuf>, settings: Vec<Setting>) -> Self {
        let usual = || Some(PathBuf::from(DEFAULT_PATH)).filter(|path| path.exists());
        Self {
            path: path.or_else(usual),
            settings,
        }
    }

    /// Reads it. A file that was there and is gone is a problem, and no reason to go by the defaults.
    ///
    /// # Errors
    /// All [`Problems`] at once.
    pub fn load(&self) -> Result<Adjusted, Problems> {
        Config::load_with(self.path.as_deref(), &self.settings)
    }

    /// Reads it once more. An editor may just have emptied the file.
    ///
    /// # Errors
    /// All [`Problems`] at once.
    pub fn load_again(&self) -> Result<Adjusted, Problems> {
        let Some(path) = &self.path else {
            return self.load();
        };
        let text = read(path)?;
        if text.trim().is_empty() {
            let path = path.display();
            return Err(Problems(vec![format!(
                "{path} is empty: write a comment into it if every default is meant"
            )]));
        }
        Config::adjusted(Some((path, &text)), &self.settings)
    }
}

impl Default for Config {
    fn default() -> Self {
        declare(&mut Reader::new(toml::Table::new()))
    }
}

/// A configuration file with every key, its meaning and its default.
#[must_use]
pub fn documentation() -> String {
    let mut reader = Reader::new(toml::Table::new());
    declare(&mut reader);
    let (_, documentation) = reader.finish();
    format!(
        "# Portcullis. Every key is here with its default; a key that is left out has it too. Unknown keys are refused.\n\
         {documentation}"
    )
}

#[expect(
    clippy::too_many_lines,
    reason = "a list of keys is as long as it is, and reads top to bottom"
)]
fn declare(r: &mut Reader) -> Config {
    let mode = r.choice(
        "mode",
        &[("observe", Mode::Observe), ("enforce", Mode::Enforce)],
        "What happens to packets of banned sources: \"observe\" counts them and lets them pass, \"enforce\" drops them.",
    );

    r.section(
        "source",
        "Nginx's access logs (see README.md for the log_format).",
    );
    let logs = r.list(
        "log",
        &["/var/log/nginx/portcullis.json"],
        "The files. They need not exist yet; names may hold *, ? and […], which leave out what is called like another match with \
         something after it (a rotated log). None: [].",
        |text| {
            let path = PathBuf::from(text);
            if !path.is_absolute() {
                return Err("must be an absolute path".to_owned());
            }
            match glob::Pattern::new(text) {
                Ok(_) => Ok(path),
                Err(error) => Err(format!("is no pattern of names: {error}")),
            }
        },
    );
    let start = r.choice(
        "start",
        &[("end", Start::End), ("beginning", Start::Beginning)],
        "Where to begin the first time: \"end\" or \"beginning\". Later the agent goes on where it stopped.",
    );
    let format = r.text(
        "format",
        "auto",
        "How lines are written: \"json\", \"combined\" (with anything after the status), \"auto\" for either, or a log_format \
         of your own, pasted from Nginx's configuration.",
    );
    let max_line = r.whole(
        "max_line_bytes",
        262_144,
        1024..=16_777_216,
        "Longer lines are skipped and counted. Nginx with its usual limits on headers writes none, however hostile the request.",
    ) as usize;
    let catch_up = Duration::from_secs(
        r.whole(
            "catch_up_secs",
            2,
            1..=3600,
            "When it would take longer than so many seconds to read what is there, of so many lines one is read, at random, and \
             stands for the others: a flood must not delay its own detection. The error of the estimate is taken off in a \
             client's favour.",
        )
        .into(),
    );
    let syslog = r.list(
        "syslog",
        &[],
        "Listen for what Nginx sends with `access_log syslog:server=…`: \"udp:127.0.0.1:5514\" (loopback only; every local user \
         can write to it) or \"unix:/run/portcullis/access.sock\" (raise the sysctl net.unix.max_dgram_qlen to 512 for that). What finds no \
         room is lost; a file loses nothing.",
        str::parse::<syslog::Listen>,
    );
    let syslog_group = r.optional_text(
        "syslog_group",
        "The group that may write to a Unix socket of those besides root: that of Nginx's workers, www-data on Debian.",
    );
    let proxies = r.list(
        "proxies",
        &[],
        "Proxies in front of Nginx, which takes clients' addresses from them (set_real_ip_from). They are never banned. Their clients \
         are not banned at the network card, where no packet has their address: people are told, or see enforce.nginx. The \
         log_format should have realip_remote_addr; without it every client is taken for one of theirs.",
        parse_net,
    );

    r.section(
        "source.fields",
        "Names of the fields in JSON lines; with a log_format of your own they are taken from that.",
    );
    let fields = Fields {
        time: r.text(
            "time",
            "timestamp",
            "Epoch seconds, ISO 8601 or $time_local.",
        ),
        client: r.text(
            "client",
            "source_ip",
            "$remote_addr: what Nginx knows, never a header that clients write.",
        ),
        status: r.text("status", "status", "$status."),
        peer: r.text(
            "peer",
            "realip_remote_addr",
            "$realip_remote_addr, the address of the connection; may be left out of the log.",
        ),
        path: r.text(
            "path",
            "path",
            "$request_uri, $uri or $request; may be left out of the log.",
        ),
        user_agent: r.text(
            "user_agent",
            "user_agent",
            "$http_user_agent; may be left out of the log.",
        ),
        method: r.text(
            "method",
            "method",
            "$request_method or $request; may be left out of the log, and need not be in it where path is $request.",
        ),
    };
    let format = match Format::new(&format, fields) {
        Ok(format) => format,
        Err(problem) => {
            r.problem(format!("source.format: {problem}"));
            Format::default()
        }
    };

    r.section("detect", "When a client leaves the normal traffic.");
    let window_secs = r.whole(
        "window_secs",
        60,
        1..=3600,
        "Length of the sliding windows, in seconds.",
    );
    let ordinary = detect::Thresholds {
        z_score: r.number(
            "z_score",
            3.0,
            0.1..=1000.0,
            "Flag a client whose rate is more than so many standard deviations above the site's mean rate …",
        ),
        times_mean: r.number("times_mean", 5.0, 1.0..=10_000.0, "… or more than so many times that mean."),
    };
    let max_clients = r.whole(
        "max_clients",
        100_000,
        1_000..=10_000_000,
        "Clients that are watched at a time (about 300 bytes each, at most 16 for each second of the window). In a full table the quietest give way.",
    );

    r.section(
        "detect.baseline",
        "What normal traffic is: learnt, never configured. Requests a second of the whole site.",
    );
    let baseline = baseline::Settings {
        span_secs: r.whole("span_secs", 1800, 10..=86_400, "Seconds of traffic that the rolling baseline covers."),
        recompute_secs: r.whole("recompute_secs", 60, 1..=3600, "Seconds between computations of mean and deviation."),
        hour_min_secs: r.whole(
            "hour_min_secs",
            900,
            10..=3600,
            "The slot of the current hour of the day (UTC) is preferred once it holds so many seconds.",
        ),
        warm_up_secs: r.whole(
            "warm_up_secs",
            300,
            1..=86_400,
            "Before so many seconds have been seen nothing counts as learnt, and the ceiling below holds instead.",
        ),
        floor_mean: r.number(
            "floor_mean_rps",
            1.0,
            0.001..=1e6,
            "Least mean, requests a second: on a quiet site a handful of requests is no anomaly.",
        ),
        floor_stddev: r.number("floor_stddev_rps", 0.5, 0.001..=1e6, "Least standard deviation, requests a second."),
        floor_error_share: r.number(
            "floor_error_share",
            0.05,
            0.0001..=1.0,
            "Least share of answers with a status of 400 or above that counts as normal, 0 to 1.",
        ),
        growth_per_hour: r.number(
            "growth_per_hour",
            4.0,
            0.0..=1000.0,
            "Mean and deviation rise by at most this factor in an hour, whatever is seen; 0: by any.",
        ),
        freeze_secs: r.whole(
            "freeze_secs",
            3600,
            0..=86_400,
            "While the site's alarm stands nothing is learnt, for so many seconds at most; 0: it is.",
        ),
    };
    let warm_up_ceiling = r.number(
        "warm_up_ceiling_rps",
        10.0,
        0.1..=1e6,
        "During warm-up a client may make so many requests a second, averaged over the window.",
    );

    r.section(
        "detect.surge",
        "A client whose answers fail much more than is normal is held to tighter thresholds.",
    );
    let surge_times_share = r.number(
        "times_share",
        3.0,
        1.0..=1000.0,
        "A surge is a share of failing answers of so many times the normal …",
    );
    let surge_min_requests = r.whole(
        "min_requests",
        20,
        1..=1_000_000,
        "… over at least so many requests in the window.",
    );
    let surge = detect::Thresholds {
        z_score: r.number("z_score", 2.0, 0.1..=1000.0, "In place of detect.z_score."),
        times_mean: r.number(
            "times_mean",
            3.0,
            1.0..=10_000.0,
            "In place of detect.times_mean.",
        ),
    };
    let defaults = detect::Settings::default();

    r.section(
        "detect.caps",
        "How much one client may do in several spans of time, whatever the site's rate. Counted is effort: a request counts in full, \
         one for a page that is new to the client and known to others as 0.55, what browsers fetch with a page as 0.25 (as 0.35 \
         where the log has no path). 0: that span is not looked at.",
    );
    let mut floor = |key: &str, span: usize, doc: &str| {
        r.number(key, defaults.caps.floors[span], 0.0..=1e6, doc)
    };
    let floors = [
        floor("second", 0, "In a second."),
        floor("ten_seconds", 1, "In ten seconds."),
        floor(
            "window",
            2,
            "In a window of 60 s; in one of another length (detect.window_secs) in proportion.",
        ),
        floor("ten_windows", 3, "In ten such windows."),
    ];
    let caps = caps::Settings {
        floors: caps::in_proportion(floors, window_secs),
        times_floor: r.number(
            "times_floor",
            defaults.caps.times_floor,
            1.0..=1000.0,
            "The caps follow what one client in a thousand reaches, up to so many times the numbers above; 1: they stay there.",
        ),
    };
    let room = r.number(
        "shared_address",
        defaults.room,
        1.0..=100.0,
        "Caps and thresholds are multiplied by this for an address that many people seem to share, because it loads the site's \
         pages as they do; 1: for nobody.",
    );

    r.section(
        "detect.failures",
        "A sequential test on a client's answers finds who guesses paths or passwords. What browsers ask for unbidden, what comes \
         with a page, and what fails for others who behave does not count.",
    );
    let failures = failures::Settings {
        score: r.number(
            "score",
            defaults.failures.score,
            0.0..=1000.0,
            "The logarithm of how much likelier a guesser is than anybody else, that flags; 0: the test is off.",
        ),
        floor_refused: r.number(
            "floor_refused",
            defaults.failures.floor_refused,
            0.001..=0.5,
            "Least share of refused answers (401, 403) that counts as normal.",
        ),
        floor_missing: r.number(
            "floor_missing",
            defaults.failures.floor_missing,
            0.001..=0.7,
            "Least share of other failing answers, such as 404, that counts as normal.",
        ),
        half_life_secs: r.number(
            "half_life_secs",
            defaults.failures.half_life_secs,
            1.0..=86_400.0,
            "Half of the score is gone after so many seconds.",
        ),
        distinct: r.whole(
            "distinct_paths",
            defaults.failures.distinct,
            1..=16,
            "Answers such as 404 flag only if so many different paths failed.",
        ),
    };

    r.section(
        "detect.site",
        "The alarm for all traffic together, which bans nobody.",
    );
    let cusum = cusum::Settings {
        drift: r.number(
            "cusum_drift",
            defaults.cusum.drift,
            0.0..=100.0,
            "The ordered tests raise the alarm when a cumulative sum says that it is no passing burst: of standard deviations \
             above the mean, second by second, less this …",
        ),
        limit: r.number(
            "cusum_limit",
            defaults.cusum.limit,
            0.0..=1e6,
            "… it must be more than so much; 0: they raise it at once.",
        ),
    };
    let attack_requests = r.whole(
        "newcomer_requests",
        defaults.attack_requests,
        0..=1000,
        "While the alarm stands, clients who were not there before it are judged by how they ask, from so many page requests \
         on: one page again and again, or (from three times as many) pages that nobody else finds. 0: they are not.",
    );
    let aftermath_secs = r.whole(
        "aftermath_secs",
        defaults.aftermath_secs,
        0..=86_400,
        "That goes on for so many seconds after the alarm.",
    );

    r.section("bans", "What follows when a client is flagged.");
    let schedule = r.list(
        "schedule",
        &["10m", "30m", "2h", "permanent"],
        "Length of the first, second … ban; the last one repeats.",
        parse_length,
    );
    let forgive_secs = r.whole(
        "forgive_secs",
        0,
        0..=10 * 365 * 86_400,
        "An offence is forgotten after so long without another; 0: never.",
    );
    let jitter = r.number(
        "jitter",
        0.0,
        0.0..=1.0,
        "Bans last longer by up to this share of their length, at random, so that those who were banned together do not come back \
         together.",
    );
    let release = Release {
        quiet: Duration::from_secs(u64::from(r.whole(
            "quiet_secs",
            60,
            0..=86_400,
            "Before a ban ends it is looked whether its source has sent anything for so long; if so, the ban is extended by the \
             length that it had, instead of the source being released and banned again as a further offence. Needs XDP; 0: never.",
        ))),
        extensions: r.whole(
            "extensions",
            3,
            0..=1000,
            "A ban is extended so often at most.",
        ),
    };
    let max_bans = r.whole(
        "max_bans",
        1_048_576,
        16..=16_777_216,
        "Bans at a time, of each family (about 100 bytes of kernel memory each).",
    );
    let prefix_members = r.whole(
        "prefix_members",
        defaults.prefix_members,
        0..=1000,
        "When so many clients of an IPv4 /24 or an IPv6 /56 were banned within an hour (twice as many of a /48), all of it is banned, \
         if nobody else of it is known to have come; 0: never.",
    );
    let max_offenders = r.whole(
        "max_offenders",
        1_000_000,
        16..=100_000_000,
        "Offenders that are remembered; the stillest is forgotten.",
    );
    let blast = blast::Settings {
        per_minute: r.whole(
            "max_per_minute",
            10_000,
            0..=10_000_000,
            "The detector makes so many bans a minute at most. Past that people are told, and the worst are banned first; 0: any number.",
        ),
        regulars: r.number(
            "max_regulars",
            0.05,
            0.0..=1.0,
            "Of the visitors who had been here before it bans at most this share within ten minutes (and at least twenty), the worst \
             first; 1: all of them.",
        ),
    };
    let allowed = r.list(
        "allow",
        &[],
        "Addresses, prefixes and names of hosts that are never banned. Names are looked up every half minute.",
        parse_allowed,
    );
    let (mut allow, mut names) = (Vec::new(), Vec::new());
    for entry in allowed {
        match entry {
            AllowEntry::Net(net) => allow.push(net),
            AllowEntry::Name(name) => names.push(name),
        }
    }
    let allow_host = r.switch(
        "allow_host",
        true,
        "Never ban this host's own addresses, its gateways and name servers, and who is logged in over SSH, as they are at the time.",
    );
    let crawlers = r.list(
        "crawlers",
        &CRAWLERS,
        "When a client is banned whose address leads to a name in one of these domains, and that name to its address, it is a crawler \
         of that search engine: the ban is lifted, and it is not banned for a day. None: [], nobody's name is looked up.",
        |text| match parse_allowed(text) {
            Ok(AllowEntry::Name(name)) => Ok(name),
            _ => Err("is no domain such as googlebot.com".to_owned()),
        },
    );

    r.section("enforce", "How bans are put in force.");
    let enforce = Enforce {
        interfaces: r.list(
            "interfaces",
            &[],
            "Interfaces to guard with XDP; none named: that of the default route.",
            |text| {
                if text.is_empty() || text.len() > 15 || text.contains(['/', ' ']) {
                    Err("is no name of an interface".to_owned())
                } else {
                    Ok(text.to_owned())
                }
            },
        ),
        backends: r.list(
            "backends",
            &["xdp-native", "xdp-generic", "iptables"],
            "Tried in this order until one works. \"dry-run\" touches nothing.",
            |text| {
                let all = [
                    Backend::XdpNative,
                    Backend::XdpGeneric,
                    Backend::Iptables,
                    Backend::DryRun,
                ];
                all.into_iter()
                    .find(|backend| backend.to_string() == text)
                    .ok_or_else(|| {
                        "must be xdp-native, xdp-generic, iptables or dry-run".to_owned()
                    })
            },
        ),
        pin_dir: r.path(
            "pin_dir",
            "/sys/fs/bpf/portcullis",
            "Where XDP pins its maps and links; on a BPF file system.",
        ),
        end_connections: r.switch(
            "end_connections",
            true,
            "When a source is banned, end the TCP connections that it has with this host, so that Nginx's workers are free \
             at once (Nginx notes each in its error log).",
        ),
        sample_one_in: r.whole(
            "sample_one_in",
            100,
            0..=1_000_000,
            "`portcullis drops` is told of one packet in so many of banned sources; 0: of none. XDP only.",
        ),
        reconcile: Duration::from_secs(
            r.whole(
                "reconcile_secs",
                8,
                1..=3600,
                "Seconds between comparisons of the kernel's bans with the ledger: what somebody has changed is mended within ten. \
                 Comparisons take a hundredth of a processor at most, so that those of very many bans are further apart (of a \
                 million some two minutes); in between some hundreds are looked at, so that the loss of many shows at once (XDP).",
            )
            .into(),
        ),
        repair: Duration::from_secs(
            r.whole(
                "repair_secs",
                3,
                1..=3600,
                "Seconds between looks whether the program is still attached, or the rules are still there.",
            )
            .into(),
        ),
    };

    r.section(
        "enforce.nginx",
        "Bans of clients that come through a proxy (source.proxies): Nginx itself refuses them.",
    );
    let include = r.optional_path(
        "include",
        "A file for Nginx to include, written by the agent and nobody else; empty: people are told instead.",
    );
    let command = |text: &str| {
        if text.is_empty() {
            Err("is no word of a command".to_owned())
        } else {
            Ok(text.to_owned())
        }
    };
    let nginx = nginx::Settings {
        include: include.clone().unwrap_or_default(),
        form: r.choice(
            "form",
            &[("deny", nginx::Form::Deny), ("geo", nginx::Form::Geo)],
            "\"deny\": for `include` in http, server or location. \"geo\": for `geo $banned { default 0; include …; }`.",
        ),
        test: r.list(
            "test",
            &["nginx", "-t"],
            "The command that says whether Nginx takes the file; if not, it gets its former content back.",
            command,
        ),
        reload: r.list(
            "reload",
            &["nginx", "-s", "reload"],
            "The command that makes Nginx read it.",
            command,
        ),
        min_interval: Duration::from_secs(
            r.whole("min_interval_secs", 5, 1..=3600, "Least time between reloads: each starts new workers.").into(),
        ),
        timeout: Duration::from_secs(
            r.whole("timeout_secs", 10, 1..=600, "A command that takes longer is ended, and has failed.").into(),
        ),
    };
    let nginx = include.map(|_| nginx);

    let (slack, webhook) = receivers(r);

    r.section("state", "What survives a restart.");
    let state_dir = r.path(
        "dir",
        "/var/lib/portcullis",
        "Folder of the ledger (ledger.redb) and the history (history.jsonl).",
    );

    r.section(
        "history",
        "Every decision, one line each. Rotated by the agent itself; let nobody else do it.",
    );
    let history = audit::Settings {
        max_bytes: r
            .whole(
                "max_bytes",
                67_108_864,
                65_536..=u32::MAX,
                "A file that would become longer becomes history.jsonl.1, that one .2 …",
            )
            .into(),
        keep: r.whole(
            "keep",
            8,
            0..=500,
            "So many rotated files stay; the oldest gives way.",
        ),
    };

    r.section(
        "control",
        "The socket behind `portcullis status`, `bans`, `ban` and `unban`.",
    );
    let control = Control {
        socket: r.path("socket", "/run/portcullis/control.sock", "Its path."),
        group: r.optional_text(
            "group",
            "The group that may use it besides root; empty: root alone.",
        ),
    };

    // Until the newest baseline on disk, and the windows before it.
    let rewind = window_secs + baseline.recompute_secs + 5;
    Config {
        mode,
        source: source::Settings {
            logs,
            start,
            format: format.clone(),
            ahead_secs: u64::from(window_secs / 4),
            limits: Limits {
                max_line,
                rewind: Duration::from_secs(rewind.into()),
            },
            catch_up,
            syslog,
            syslog_group,
        },
        engine: Engine {
            format,
            baseline,
            detect: detect::Settings {
                window_secs,
                ordinary,
                surge,
                surge_times_share,
                surge_min_requests,
                warm_up_ceiling,
                caps,
                failures,
                room,
                cusum,
                attack_requests,
                aftermath_secs,
                prefix_members,
            },
            schedule,
            forgive: Duration::from_secs(forgive_secs.into()),
            jitter,
            release,
            blast,
            allow,
            proxies,
            proxied: if nginx.is_some() {
                Proxied::Ban
            } else {
                Proxied::Tell
            },
            max_clients: max_clients as usize,
            max_bans: max_bans as usize,
            max_offenders: max_offenders as usize,
        },
        surroundings: surroundings::Settings {
            host: allow_host,
            names,
        },
        crawlers,
        enforce,
        nginx,
        slack,
        webhook,
        state_dir,
        history,
        control,
    }
}

/// Domains of the search engines that say how their crawlers can be told: developers.google.com/search (verifying Google's
/// crawlers; not google.com and googleusercontent.com, in which there is what others can send anywhere), Bing's webmaster help,
/// Apple's and Yandex's support pages.
const CRAWLERS: [&str; 6] = [
    "googlebot.com",
    "search.msn.com",
    "applebot.apple.com",
    "yandex.com",
    "yandex.net",
    "yandex.ru",
];

/// Entries of `bans.allow`. In the kernel there is room for these, for as many others in their place while they are exchanged,
/// and for what operators add and crawlers.
const MAX_ALLOW: usize = 4000;

/// An entry of the allowlist.
enum AllowEntry {
    Net(IpNet),
    Name(String),
}

fn parse_allowed(text: &str) -> Result<AllowEntry, String> {
    let error = match parse_net(text) {
        Ok(net) => return Ok(AllowEntry::Net(net)),
        Err(error) => error,
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    };
    // A number at the end would be an address that was mistyped.
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_name = name.len() <= 253
        && name.split('.').all(is_label)
        && last.chars().any(|c| c.is_ascii_alphabetic());
    if is_name {
        Ok(AllowEntry::Name(name.to_ascii_lowercase()))
    } else {
        Err(format!("{error}, nor a name of a host"))
    }
}

/// Who is told.
fn receivers(r: &mut Reader) -> (Option<slack::Settings>, Option<webhook::Settings>) {
    r.section(
        "slack",
        "Word to people. Never waited for. `portcullis notify test` sends a message.",
    );
    let webhook_file = r.optional_path(
        "webhook_file",
        "File that holds the address of an incoming webhook; empty: nobody is told. In a systemd unit: \
         LoadCredential=, and \"$CREDENTIALS_DIRECTORY/…\" written out.",
    );
    let slack = slack::Settings {
        webhook_file: webhook_file.clone().unwrap_or_default(),
        dashboard: r.optional_text("dashboard", "Link to put into every message."),
        runbook: r.optional_text("runbook", "Link to put into every message."),
        limits: limits(
            r,
            256,
            1000,
            "Least time between messages; Slack takes one a second. In a flood of bans messages become digests, 10, 30, then 60 times \
             as far apart.",
        ),
    };

    r.section(
        "webhook",
        "The same for programs: each event as JSON, as in history.jsonl, 100 in a request at most. Never waited for.",
    );
    let url_file = r.optional_path(
        "url_file",
        "File that holds the address to post to, https (or http on the loopback); empty: nobody is told. Redirects are not followed.",
    );
    let token_file = r.optional_path(
        "token_file",
        "File that holds a token, sent as `Authorization: Bearer …`; empty: none is sent.",
    );
    let webhook = webhook::Settings {
        url_file: url_file.clone().unwrap_or_default(),
        token_file: token_file.clone(),
        limits: limits(r, 4096, 100, "Least time between requests."),
    };
    if token_file.is_some() && url_file.is_none() {
        r.problem(
            "webhook.token_file is set and webhook.url_file is not: name the file that holds the address, too"
                .to_owned(),
        );
    }
    (webhook_file.map(|_| slack), url_file.map(|_| webhook))
}

/// `least` and `pace` are of the time between requests.
fn limits(r: &mut Reader, queue: u32, least: u32, pace: &str) -> notify::Limits {
    notify::Limits {
        min_interval: Duration::from_millis(
            r.whole("min_interval_ms", 1000, least..=3_600_000, pace)
                .into(),
        ),
        queue: r.whole(
            "queue",
            queue,
            1..=65_536,
            "Events that may wait; past that the least important are dropped and counted.",
        ) as usize,
        timeout: Duration::from_secs(
            r.whole("timeout_secs", 5, 1..=60, "For one request.")
                .into(),
        ),
    }
}

fn parse_net(text: &str) -> Result<IpNet, String> {
    let subject = text.parse::<Subject>();
    subject.map(Subject::net).map_err(|error| error.to_string())
}

fn parse_length(text: &str) -> Result<Length, String> {
    if text == "permanent" {
        return Ok(Length::Permanent);
    }
    match parse_duration(text) {
        Ok(duration) if duration >= Duration::from_secs(1) => Ok(Length::For(duration)),
        Ok(_) => Err("must be at least 1s".to_owned()),
        Err(error) => Err(format!(
            "must be \"permanent\" or a length of time: {error}"
        )),
    }
}

/// What no key can say by itself.
fn check(config: &Config, r: &mut Reader) {
    let detect = &config.engine.detect;
    let baseline = &config.engine.baseline;
    let mut must = |holds: bool, problem: String| {
        if !holds {
            r.problem(problem);
        }
    };
    must(
        detect.surge.z_score <= detect.ordinary.z_score,
        format!(
            "detect.surge.z_score = {} must not be above detect.z_score = {}: a surge tightens",
            detect.surge.z_score, detect.ordinary.z_score
        ),
    );
    must(
        detect.surge.times_mean <= detect.ordinary.times_mean,
        format!(
            "detect.surge.times_mean = {} must not be above detect.times_mean = {}: a surge tightens",
            detect.surge.times_mean, detect.ordinary.times_mean
        ),
    );
    must(
        baseline.warm_up_secs <= baseline.span_secs,
        format!(
            "detect.baseline.warm_up_secs = {} must not be above detect.baseline.span_secs = {}: the warm-up would never end",
            baseline.warm_up_secs, baseline.span_secs
        ),
    );
    let share = detect.surge_times_share * baseline.floor_error_share;
    must(
        share <= 1.0,
        format!(
            "detect.surge.times_share = {} times detect.baseline.floor_error_share = {} is {share}: more than all answers \
             can never fail, so there would never be a surge",
            detect.surge_times_share, baseline.floor_error_share
        ),
    );
    must(
        !config.engine.schedule.is_empty(),
        "bans.schedule must name at least one length of time".to_owned(),
    );
    must(
        !config.enforce.backends.is_empty(),
        "enforce.backends must name at least one back end".to_owned(),
    );
    for (key, nets) in [
        ("bans.allow", &config.engine.allow),
        ("source.proxies", &config.engine.proxies),
    ] {
        // Two halves are everybody too.
        let everybody: Vec<IpNet> = IpNet::aggregate(nets)
            .into_iter()
            .filter(|net| net.prefix_len() == 0)
            .collect();
        must(
            everybody.is_empty(),
            format!("{key} = {everybody:?} allows everybody: name the networks that you trust"),
        );
    }
    let allow = config.engine.allow.len() + config.engine.proxies.len();
    must(
        allow <= MAX_ALLOW,
        format!(
            "bans.allow and source.proxies have {allow} networks and addresses: name wider networks, there is room for {MAX_ALLOW}"
        ),
    );
    must(
        !config.source.logs.is_empty() || !config.source.syslog.is_empty(),
        "source.log and source.syslog are both empty: there is nothing to go by".to_owned(),
    );
    let commands = config
        .nginx
        .iter()
        .flat_map(|nginx| [("test", &nginx.test), ("reload", &nginx.reload)]);
    for (key, command) in commands {
        must(
            !command.is_empty(),
            format!("enforce.nginx.{key} must name a command"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        Config::parse(text).expect_err("should be refused").0
    }

    #[test]
    fn the_documented_file_is_the_default() {
        let parsed = Config::parse(&documentation()).unwrap();
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::default()));
        assert_eq!(
            format!("{:?}", Config::parse("").unwrap()),
            format!("{:?}", Config::default())
        );
    }

    #[test]
    fn the_ordered_numbers_are_the_defaults() {
        let Config { mode, engine, .. } = Config::default();
        assert_eq!(mode, Mode::Observe, "a fresh install watches");
        assert_eq!(
            (
                engine.detect.window_secs,
                engine.baseline.span_secs,
                engine.baseline.recompute_secs
            ),
            (60, 1800, 60)
        );
        assert_eq!(
            (
                engine.detect.ordinary.z_score,
                engine.detect.ordinary.times_mean
            ),
            (3.0, 5.0)
        );
        assert_eq!(
            (engine.detect.surge.z_score, engine.detect.surge.times_mean),
            (2.0, 3.0)
        );
        let minutes = |n| Length::For(Duration::from_mins(n));
        assert_eq!(
            engine.schedule,
            [minutes(10), minutes(30), minutes(120), Length::Permanent]
        );
    }

    #[test]
    fn every_problem_is_reported_at_once_with_what_would_be_right() {
        let all = problems(
            r#"
            mode = "on"
            speed = 1
            [detect]
            zscore = 3
            z_score = -1
            window_secs = "a minute"
            [detect.baseline]
            span_secs = 100
            warm_up_secs = 200
            [bans]
            schedule = ["10m", "soon"]
            allow = ["10.0.0.0/40", "0.0.0.0/0"]
            [slak]
            x = 1
            "#,
        );
        for expected in [
            r#"mode = "on" must be "observe" or "enforce""#,
            "unknown key speed",
            "unknown key detect.zscore (is detect.z_score meant?)",
            "detect.z_score = -1 must be from 0.1 to 1000",
            r#"detect.window_secs = "a minute" must be a whole number from 1 to 3600"#,
            "detect.baseline.warm_up_secs = 200 must not be above detect.baseline.span_secs = 100",
            r#"bans.schedule: "soon" must be "permanent" or a length of time"#,
            r#"bans.allow: "10.0.0.0/40""#,
            "allows everybody",
            "unknown section slak (is slack meant?)",
        ] {
            assert!(
                all.iter().any(|problem| problem.contains(expected)),
                "{expected} is not in {all:#?}"
            );
        }
        assert_eq!(all.len(), 10, "{all:#?}");
    }

    #[test]
    fn a_file_that_was_there_and_is_gone_or_emptied_is_no_reason_to_go_by_the_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.toml");
        std::fs::write(&path, "[bans]\njitter = 0.5\n").unwrap();
        let input = Input::new(Some(path.clone()), Vec::new());
        assert_eq!(input.load_again().unwrap().config.engine.jitter, 0.5);
        let said = |input: &Input| input.load_again().unwrap_err().to_string();
        std::fs::write(&path, " \n").unwrap();
        assert!(said(&input).contains("is empty"), "{}", said(&input));
        std::fs::write(&path, "# All as it is by default.\n").unwrap();
        assert_eq!(input.load_again().unwrap().config.engine.jitter, 0.0);
        std::fs::remove_file(&path).unwrap();
        assert!(said(&input).contains("cannot read"), "{}", said(&input));
    }

    #[test]
    fn a_text_that_is_no_toml_says_where() {
        let all = problems("mode = observe");
        assert!(all[0].contains("line 1"), "{all:?}");
    }

    #[test]
    fn the_shipped_example_is_the_documented_default() {
        let shipped = include_str!("../assets/portcullis.toml");
        assert_eq!(
            shipped,
            documentation(),
            "write it anew: `portcullis config > agent/assets/portcullis.toml`"
        );
    }
}
