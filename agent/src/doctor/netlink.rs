//! The few questions to the kernel's netlink families that tell what an interface can do: one request, one answer.
//!
//! In place of `ip -json` and `ethtool`: neither need be installed, nothing is parsed that is meant for people, and the
//! answer is that of the calling thread's network namespace (a /sys may show another one's).

use std::{collections::BTreeSet, os::fd::AsRawFd as _};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike as _},
    },
};

/// An answer holds far less: an interface without its virtual functions is about 2 KiB.
const LONGEST: usize = 64 * 1024;
/// Messages that are looked at before giving up.
const PATIENCE: usize = 8;

const REQUEST: u16 = 1;
const ERROR: u16 = 2;
const NESTED: u16 = 1 << 15;
const HEADER: usize = 16;

/// What `RTM_GETLINK` tells of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    /// As ARP numbers it: 1 is Ethernet.
    pub(super) hardware: u16,
    /// Bit 0: it is up.
    pub(super) flags: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    /// Of a virtual interface: veth, bond, bridge, vlan …
    pub(super) kind: Option<String>,
    /// What it is a member of: bond, bridge, team …
    pub(super) member_of: Option<String>,
    pub(super) master: Option<u32>,
    /// What it stands on: a VLAN's parent, a veth's other end.
    pub(super) lower: Option<u32>,
    pub(super) rx_queues: Option<u32>,
    /// Where in /sys/bus its device is: `("virtio", "virtio0")`.
    pub(super) device: Option<(String, String)>,
    /// XDP programs: in the driver, generic, in the hardware.
    pub(super) native: Option<u32>,
    pub(super) generic: Option<u32>,
    pub(super) hardware_program: Option<u32>,
}

/// Queues, as `ethtool -l` shows them; combined ones, or where a driver has none, those that receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Channels {
    pub(super) now: u32,
    pub(super) most: u32,
}

/// What an interface is.
pub(super) fn link(name: &str) -> Result<Link, Errno> {
    const GETLINK: u16 = 18;
    const IFNAME: u16 = 3;
    let mut body = vec![0; 16];
    put(&mut body, IFNAME, &[name.as_bytes(), &[0]].concat());
    link_of(&ask(SockProtocol::NetlinkRoute, GETLINK, &body)?).ok_or(Errno::EBADMSG)
}

/// Bits of `NETDEV_XDP_ACT`: what XDP the driver can. Kernels before 6.3 cannot say.
pub(super) fn xdp_features(index: u32) -> Option<u64> {
    const DEV_GET: u8 = 1;
    const IFINDEX: u16 = 1;
    let mut body = generic(DEV_GET);
    put(&mut body, IFINDEX, &index.to_ne_bytes());
    xdp_features_of(&ask(SockProtocol::NetlinkGeneric, family("netdev")?, &body).ok()?)
}

/// Names of the offloads that are on, as `ethtool -k` shows them. Kernels before 5.7 cannot say.
pub(super) fn offloads(index: u32) -> Option<BTreeSet<String>> {
    const FEATURES_GET: u8 = 11;
    offloads_of(&ethtool(FEATURES_GET, index)?)
}

/// Queues. Kernels before 5.7 cannot say, nor can drivers with a fixed number.
pub(super) fn channels(index: u32) -> Option<Channels> {
    const CHANNELS_GET: u8 = 17;
    channels_of(&ethtool(CHANNELS_GET, index)?)
}

fn ethtool(command: u8, index: u32) -> Option<Vec<u8>> {
    const ETHTOOL_HEADER: u16 = 1;
    const DEV_INDEX: u16 = 1;
    let mut header = Vec::new();
    put(&mut header, DEV_INDEX, &index.to_ne_bytes());
    let mut body = generic(command);
    put(&mut body, ETHTOOL_HEADER | NESTED, &header);
    ask(SockProtocol::NetlinkGeneric, family("ethtool")?, &body).ok()
}

/// The number of a family of generic netlink.
fn family(name: &str) -> Option<u16> {
    const CONTROLLER: u16 = 16;
    const GETFAMILY: u8 = 3;
    const FAMILY_ID: u16 = 1;
    const FAMILY_NAME: u16 = 2;
    let mut body = generic(GETFAMILY);
    put(&mut body, FAMILY_NAME, &[name.as_bytes(), &[0]].concat());
    let answer = ask(SockProtocol::NetlinkGeneric, CONTROLLER, &body).ok()?;
    let id = attribute(answer.get(4..)?, FAMILY_ID)?;
    Some(u16::from_ne_bytes(*id.first_chunk()?))
}

/// The head of a message of generic netlink.
fn generic(command: u8) -> Vec<u8> {
    vec![command, 1, 0, 0]
}

fn ask(protocol: SockProtocol, kind: u16, body: &[u8]) -> Result<Vec<u8>, Errno> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(1))?;
    sendto(
        socket.as_raw_fd(),
        &message(kind, body),
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )?;
    let mut buffer = vec![0; LONGEST];
    for _ in 0..PATIENCE {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if let Some(answer) = answer(buffer.get(..length).unwrap_or_default()) {
            return answer;
        }
    }
    Err(Errno::EBADMSG)
}

fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend(body);
    message
}

fn put(body: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(payload);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// What the first message that is an answer holds, or the kernel's error.
fn answer(mut bytes: &[u8]) -> Option<Result<Vec<u8>, Errno>> {
    loop {
        let length = u32_at(bytes, 0)? as usize;
        let kind = u16::from_ne_bytes(*bytes.get(4..6)?.first_chunk()?);
        let payload = bytes.get(HEADER..length)?;
        match kind {
            ERROR => {
                let code = i32::from_ne_bytes(*payload.first_chunk()?);
                return Some(Err(Errno::from_raw(code.checked_neg().unwrap_or_default())));
            }
            kind if kind > 3 => return Some(Ok(payload.to_vec())),
            // Nothing, done, overrun.
            _ => bytes = bytes.get(length.next_multiple_of(4)..)?,
        }
    }
}

/// A message's attributes: type and payload. Ends where the bytes make no sense any more.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..4)?.first_chunk()?);
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The upper two bits say how the payload is to be read.
        Some((kind & 0x3fff, payload))
    })
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(other, payload)| (other == kind).then_some(payload))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(
        *bytes.get(at..at.checked_add(4)?)?.first_chunk()?,
    ))
}

fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn link_of(payload: &[u8]) -> Option<Link> {
    let mut link = Link {
        hardware: u16::from_ne_bytes(*payload.get(2..4)?.first_chunk()?),
        index: u32_at(payload, 4)?,
        flags: u32_at(payload, 8)?,
        ..Link::default()
    };
    let (mut bus, mut device) = (None, None);
    for (kind, value) in attributes(payload.get(16..)?) {
        match kind {
            3 => link.name = text(value),
            4 => link.mtu = u32_at(value, 0)?,
            5 => link.lower = u32_at(value, 0),
            10 => link.master = u32_at(value, 0),
            18 => {
                link.kind = attribute(value, 1).map(text);
                link.member_of = attribute(value, 4).map(text);
            }
            32 => link.rx_queues = u32_at(value, 0),
            43 => {
                let id = |kind| {
                    attribute(value, kind)
                        .and_then(|id| u32_at(id, 0))
                        .filter(|id| *id != 0)
                };
                (link.native, link.generic, link.hardware_program) = (id(5), id(6), id(7));
            }
            56 => device = Some(text(value)),
            57 => bus = Some(text(value)),
            _ => {}
        }
    }
    link.device = bus.zip(device);
    Some(link)
}

fn xdp_features_of(payload: &[u8]) -> Option<u64> {
    const XDP_FEATURES: u16 = 3;
    let features = attribute(payload.get(4..)?, XDP_FEATURES)?;
    Some(u64::from_ne_bytes(*features.first_chunk()?))
}

fn offloads_of(payload: &[u8]) -> Option<BTreeSet<String>> {
    const ACTIVE: u16 = 4;
    const BITS: u16 = 3;
    const NAME: u16 = 2;
    // A list without mask: the bits that are named are set.
    let bits = attribute(attribute(payload.get(4..)?, ACTIVE)?, BITS)?;
    Some(
        attributes(bits)
            .filter_map(|(_, bit)| attribute(bit, NAME).map(text))
            .collect(),
    )
}

fn channels_of(payload: &[u8]) -> Option<Channels> {
    let count = |kind| {
        attribute(payload.get(4..)?, kind)
            .and_then(|value| u32_at(value, 0))
            .filter(|count| *count > 0)
    };
    let (combined, receive) = ((5, 9), (2, 6));
    let of = |(most, now)| {
        Some(Channels {
            most: count(most)?,
            now: count(now)?,
        })
    };
    of(combined).or_else(|| of(receive))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nest(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, payload) in attributes {
            put(&mut bytes, *kind, payload);
        }
        bytes
    }

    fn sample() -> Vec<u8> {
        let mut payload = vec![0, 0, 1, 0];
        payload.extend(7_u32.to_ne_bytes());
        payload.extend(0x1043_u32.to_ne_bytes());
        payload.extend([0; 4]);
        payload.extend(nest(&[
            (3, b"eth0\0"),
            (4, &9000_u32.to_ne_bytes()),
            (10, &3_u32.to_ne_bytes()),
            (32, &2_u32.to_ne_bytes()),
            (0x12 | NESTED, &nest(&[(1, b"veth\0"), (4, b"bond\0")])),
            (
                43,
                &nest(&[
                    (2, &[1]),
                    (5, &77_u32.to_ne_bytes()),
                    (6, &0_u32.to_ne_bytes()),
                ]),
            ),
            (56, b"virtio0\0"),
            (57, b"virtio\0"),
        ]));
        payload
    }

    #[test]
    fn an_interface_reads_back() {
        let link = link_of(&sample()).unwrap();
        assert_eq!(
            link,
            Link {
                index: 7,
                hardware: 1,
                flags: 0x1043,
                name: "eth0".into(),
                mtu: 9000,
                kind: Some("veth".into()),
                member_of: Some("bond".into()),
                master: Some(3),
                rx_queues: Some(2),
                device: Some(("virtio".into(), "virtio0".into())),
                native: Some(77),
                ..Link::default()
            }
        );
    }

    #[test]
    fn abilities_read_back() {
        let mut payload = vec![0; 4];
        payload.extend(nest(&[(3, &0x23_u64.to_ne_bytes())]));
        assert_eq!(xdp_features_of(&payload), Some(0x23));

        let bit = nest(&[(1, &15_u32.to_ne_bytes()), (2, b"rx-lro\0"), (3, b"")]);
        let bits = nest(&[(1, &bit)]);
        let mut payload = vec![0; 4];
        payload.extend(nest(&[(
            4,
            &nest(&[(1, b""), (2, &64_u32.to_ne_bytes()), (3, &bits)]),
        )]));
        assert_eq!(
            offloads_of(&payload),
            Some(BTreeSet::from(["rx-lro".to_owned()]))
        );

        let mut payload = vec![0; 4];
        payload.extend(nest(&[
            (5, &8_u32.to_ne_bytes()),
            (9, &4_u32.to_ne_bytes()),
            (2, &0_u32.to_ne_bytes()),
        ]));
        assert_eq!(channels_of(&payload), Some(Channels { now: 4, most: 8 }));
    }

    fn read_all(bytes: &[u8]) {
        drop((link_of(bytes), offloads_of(bytes), answer(bytes)));
        let _numbers = (channels_of(bytes), xdp_features_of(bytes));
    }

    #[test]
    fn any_bytes_at_all_are_survived() {
        let whole = sample();
        for end in 0..whole.len() {
            read_all(&whole[..end]);
            for value in [0, 1, 3, 4, 0x7f, 0xff] {
                let mut bad = whole.clone();
                bad[end] = value;
                read_all(&bad);
            }
        }
        // A message or attribute of length zero must not be gone round for ever.
        assert_eq!(answer(&[0; 64]), None);
        assert_eq!(attributes(&[0; 64]).count(), 0);
    }

    #[test]
    fn an_error_is_told_from_an_answer() {
        let mut refused = message(ERROR, &(-19_i32).to_ne_bytes());
        assert_eq!(answer(&refused), Some(Err(Errno::ENODEV)));
        refused[16..20].copy_from_slice(&i32::MIN.to_ne_bytes());
        assert!(matches!(answer(&refused), Some(Err(_))));
        assert_eq!(answer(&message(18, b"data")), Some(Ok(b"data".to_vec())));
    }

    #[test]
    fn the_kernel_answers() {
        let lo = link("lo").unwrap();
        assert_eq!((lo.name.as_str(), lo.index, lo.hardware), ("lo", 1, 772));
        assert_eq!(link("no-such-iface"), Err(Errno::ENODEV));
    }
}
