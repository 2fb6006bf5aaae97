//! A server that sends anything to the NBD client: whatever comes, in whatever pieces, there is no panic, no request for more bytes at once than the client has
//! room for, no byte outside of what was asked for and none twice, and no read that is over without all of its bytes.
//!
//! The first byte chooses what the input is sent to: a client that has just connected, or one that
//! has agreed already, with or without chunks. The next is how much comes at a time. The rest is what the server sends.

#![no_main]

#[allow(dead_code, reason = "it is that of the engine's tests, which use more of it")]
#[path = "../../engine/tests/nbd_client/driver.rs"]
mod driver;

use driver::{Session, agreement, negotiate};
use engine::nbd::client::{Agreement, Request};
use engine::units::ByteRange;
use libfuzzer_sys::fuzz_target;

/// One of everything, and several reads. Their cookies are 1 to 9.
fn ask(session: &mut Session) {
    let range = |offset, length| ByteRange::new(offset, length);
    for request in [
        Request::Read(range(0, 1)),
        Request::Read(range(100, 64)),
        Request::Write { range: range(0, 512), fua: false },
        Request::Status { range: range(0, 1 << 31), most: 2 },
        Request::Flush,
        Request::Read(range(4096, 5000)),
        Request::Status { range: range(512, 512), most: 64 },
        Request::WriteZeroes { range: range(0, 1 << 30), no_hole: false, fua: true },
        Request::Depth { range: range(0, 65536), most: 8 },
    ] {
        session.ask(request);
    }
}

/// What comes at a time, by turns.
fn pieces(choice: u8) -> impl FnMut() -> usize {
    let sizes = [1 + usize::from(choice & 15), 1 << (choice >> 4)];
    let mut turn = 0;
    move || {
        turn += 1;
        sizes[turn % 2]
    }
}

fuzz_target!(|input: &[u8]| {
    let [choice, size, stream @ ..] = input else { return };
    if choice & 1 == 0 {
        let whole = negotiate("disk", stream, || usize::MAX / 2);
        assert_eq!(negotiate("disk", stream, pieces(*size)), whole, "how it is cut makes no difference");
        return;
    }
    let depth = (choice & 8 != 0).then_some(2);
    let agreed = Agreement { depth, ..agreement(choice & 2 != 0, (choice & 4 != 0).then_some(1)) };
    let mut session = Session::new(&agreed);
    ask(&mut session);
    let mut whole = session.clone();
    session.feed(stream, pieces(*size));
    whole.feed(stream, || usize::MAX / 2);
    assert_eq!(
        (session.asked, session.broken),
        (whole.asked, whole.broken),
        "how it is cut makes no difference"
    );
});
