//! What each byte of a live disk may be.
//!
//! Every byte has a list of *candidates*: what it held at the start, and what each request that changes it would leave there. A
//! request that was submitted after another one had ended comes after it, so when it has succeeded the other is no
//! candidate any more. Of requests that were under way at the same time either may be the last. One that failed may have happened or not, in part.
//! A discard leaves anything, and may happen any time until somebody writes there after it was acknowledged.

use std::collections::BTreeMap;

use engine::live::carrier::IoId;
use engine::units::ByteRange;

/// What a request leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// What was there at the start.
    Initial,
    /// [`pattern`] of a request.
    Data(IoId),
    /// Zeros.
    Zeros,
    /// Anything.
    Undefined,
}

/// The byte at `offset` as `id` writes it.
fn pattern(id: IoId, offset: u64) -> u8 {
    let mixed = (id.0 << 32 ^ offset).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed.to_be_bytes()[0]
}

/// The bytes that `id` writes to `range`.
pub(crate) fn data(id: IoId, range: ByteRange) -> Vec<u8> {
    (range.offset..range.end()).map(|offset| pattern(id, offset)).collect()
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: Option<IoId>,
    content: Content,
    ended: u64,
}

#[derive(Debug)]
struct Change {
    range: ByteRange,
    content: Content,
    submitted: u64,
}

/// What a look at the disk that began some time ago may find.
#[derive(Debug)]
struct Look {
    range: ByteRange,
    allowed: Vec<(ByteRange, Content)>,
}

/// See the module's header.
pub(crate) struct Shadow {
    initial: Vec<u8>,
    /// Start of each stretch whose bytes have the same candidates; it ends where the next one starts.
    stretches: BTreeMap<u64, Vec<Candidate>>,
    changes: BTreeMap<IoId, Change>,
    looks: BTreeMap<IoId, Look>,
    clock: u64,
}

impl Shadow {
    pub(crate) fn new(initial: Vec<u8>) -> Self {
        let start = vec![Candidate { id: None, content: Content::Initial, ended: 0 }];
        Self {
            initial,
            stretches: BTreeMap::from([(0, start)]),
            changes: BTreeMap::new(),
            looks: BTreeMap::new(),
            clock: 0,
        }
    }

    fn length(&self) -> u64 {
        self.initial.len() as u64
    }

    fn split_at(&mut self, offset: u64) {
        if offset < self.length() && !self.stretches.contains_key(&offset) {
            let (_, here) = self.stretches.range(..offset).next_back().expect("the first starts at 0");
            let here = here.clone();
            self.stretches.insert(offset, here);
        }
    }

    /// A request that changes the disk was submitted.
    pub(crate) fn change(&mut self, id: IoId, range: ByteRange, content: Content) {
        self.clock += 1;
        self.split_at(range.offset);
        self.split_at(range.end());
        for (_, list) in self.stretches.range_mut(range.offset..range.end()) {
            list.push(Candidate { id: Some(id), content, ended: u64::MAX });
        }
        for look in self.looks.values_mut() {
            if let Some(part) = look.range.intersection(range) {
                look.allowed.push((part, content));
            }
        }
        self.changes.insert(id, Change { range, content, submitted: self.clock });
    }

    /// It has ended. `None`: without effect.
    pub(crate) fn changed(&mut self, id: IoId, succeeded: Option<bool>) {
        self.clock += 1;
        let Change { range, content, submitted } = self.changes.remove(&id).expect("submitted before");
        let settles = succeeded == Some(true) && content != Content::Undefined;
        for (_, list) in self.stretches.range_mut(range.offset..range.end()) {
            if succeeded.is_none() {
                list.retain(|candidate| candidate.id != Some(id));
                continue;
            }
            let own = list.iter_mut().find(|candidate| candidate.id == Some(id));
            own.expect("a candidate since it was submitted").ended = self.clock;
            list.retain(|candidate| !settles || candidate.ended >= submitted);
        }
    }

    /// Somebody begins to look at `range`.
    pub(crate) fn look(&mut self, id: IoId, range: ByteRange) {
        let ends = self.stretches.keys().skip(1).copied().chain([self.length()]);
        let mut allowed = Vec::new();
        for ((&start, list), end) in self.stretches.iter().zip(ends) {
            if let Some(part) = ByteRange::between(start, end).intersection(range) {
                allowed.extend(list.iter().map(|candidate| (part, candidate.content)));
            }
        }
        self.looks.insert(id, Look { range, allowed });
    }

    /// The look found `bytes`; `None`: nothing.
    pub(crate) fn looked(&mut self, id: IoId, bytes: Option<&[u8]>) -> Result<(), String> {
        let Look { range, allowed } = self.looks.remove(&id).expect("looks since it was submitted");
        let Some(bytes) = bytes else { return Ok(()) };
        if bytes.len() as u64 != range.length {
            return Err(format!("{} bytes read of {range}", bytes.len()));
        }
        let mut fits = vec![false; bytes.len()];
        for (part, content) in &allowed {
            for offset in part.offset..part.end() {
                let at = usize::try_from(offset - range.offset).unwrap();
                fits[at] = fits[at] || self.fits(*content, offset, bytes[at]);
            }
        }
        let Some(at) = fits.iter().position(|fits| !fits) else { return Ok(()) };
        let offset = range.offset + at as u64;
        let meant: Vec<_> = allowed
            .iter()
            .filter(|(part, _)| part.intersection(ByteRange::new(offset, 1)).is_some())
            .map(|(_, content)| content)
            .collect();
        Err(format!("{id:?} of {range}: byte {offset} is {}, may be {meant:?}", bytes[at]))
    }

    fn fits(&self, content: Content, offset: u64, byte: u8) -> bool {
        match content {
            Content::Initial => byte == self.initial[usize::try_from(offset).unwrap()],
            Content::Data(id) => byte == pattern(id, offset),
            Content::Zeros => byte == 0,
            Content::Undefined => true,
        }
    }

    /// Whether the disk holds `view`. Changes that nobody waited for may still be under way.
    pub(crate) fn check(&mut self, view: &[u8]) -> Result<(), String> {
        if view.len() as u64 != self.length() {
            return Err(format!("the disk is {} bytes long, was {}", view.len(), self.length()));
        }
        let all = IoId(u64::MAX);
        self.look(all, ByteRange::new(0, self.length()));
        self.looked(all, Some(view))
    }
}
