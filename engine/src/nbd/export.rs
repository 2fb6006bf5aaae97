//! What an export offers, and where exports are looked up.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::wire::{self, MAX_STRING_BYTES};
use crate::error::{Error, Operation, Refusal, Result};
use crate::units::Length;

/// Sizes that a client is told. The constants of the protocol are in [`Self::DEFAULT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    minimum: u32,
    preferred: u32,
    maximum_payload: u32,
}

impl BlockSizes {
    /// What a client assumes if nothing was agreed: 1 byte, 4 KiB, 32 MiB.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, maximum_payload: 32 << 20 };

    /// Sizes in bytes: `minimum` a power of two up to 64 KiB, `preferred` one that is no smaller, nor smaller than 512, `maximum_payload` at
    /// least that and a multiple of the minimum, and at most 32 MiB. `None` if they are not.
    #[must_use]
    pub fn new(minimum: u32, preferred: u32, maximum_payload: u32) -> Option<Self> {
        let good = minimum.is_power_of_two()
            && minimum <= 64 << 10
            && preferred.is_power_of_two()
            && preferred >= minimum.max(512)
            && (preferred..=32 << 20).contains(&maximum_payload)
            && maximum_payload.is_multiple_of(minimum);
        good.then_some(Self { minimum, preferred, maximum_payload })
    }

    /// Offsets and lengths are multiples of this.
    #[must_use]
    pub fn minimum(self) -> u32 {
        self.minimum
    }

    /// Offsets and lengths that are multiples of this are fast.
    #[must_use]
    pub fn preferred(self) -> u32 {
        self.preferred
    }

    /// Most bytes of a read or write.
    #[must_use]
    pub fn maximum_payload(self) -> u32 {
        self.maximum_payload
    }
}

/// What a disk can do. Of a read-only export, what changes the disk is not offered whatever is said here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// It can be flushed, and writes can be made durable before their reply (FUA).
    pub flush: bool,
    /// Ranges can be discarded.
    pub trim: bool,
    /// Ranges can be made zero without sending zeros.
    pub write_zeroes: bool,
    /// It tells quickly whether making zeros is faster than writing them.
    pub fast_zero: bool,
    /// Ranges can be asked to be cached.
    pub cache: bool,
    /// What was flushed on one connection is on the disk for all.
    pub multi_conn: bool,
    /// It has heads that move.
    pub rotational: bool,
}

impl Features {
    /// Everything but heads that move.
    pub const ALL: Self = Self {
        flush: true,
        trim: true,
        write_zeroes: true,
        fast_zero: true,
        cache: true,
        multi_conn: true,
        rotational: false,
    };
}

/// What block status can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MetaContext {
    /// `base:allocation`: bit 0 is a hole, bit 1 reads as zeros.
    Allocation,
    /// `qemu:allocation-depth`: 0 is unallocated, 1 in the top layer, 2 and more in a layer below.
    AllocationDepth,
    /// `qemu:dirty-bitmap:NAME`: bit 0 is dirty.
    DirtyBitmap(Arc<str>),
}

impl MetaContext {
    /// As the protocol spells it.
    #[must_use]
    pub fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Allocation => "base:allocation".into(),
            Self::AllocationDepth => "qemu:allocation-depth".into(),
            Self::DirtyBitmap(name) => format!("qemu:dirty-bitmap:{name}").into(),
        }
    }

    /// Whether a query of a list asks for it. An empty leaf is a wildcard there, and so is that of `qemu:dirty-bitmap:`.
    pub(super) fn is_listed_by(&self, query: &str) -> bool {
        let wildcard = match self {
            Self::Allocation => query == "base:",
            Self::AllocationDepth => query == "qemu:",
            Self::DirtyBitmap(_) => query == "qemu:" || query == "qemu:dirty-bitmap:",
        };
        wildcard || self.is_selected_by(query)
    }

    /// Whether a query of a selection asks for it: by its whole name.
    pub(super) fn is_selected_by(&self, query: &str) -> bool {
        self.name() == query
    }
}

impl fmt::Display for MetaContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A disk as it is offered under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    name: Arc<str>,
    description: String,
    length: Length,
    read_only: bool,
    /// What the disk can do.
    pub features: Features,
    /// Sizes that the client is told.
    pub block_sizes: BlockSizes,
    contexts: Vec<MetaContext>,
}

impl Export {
    /// Longest name, and longest description, in bytes.
    pub const MAX_NAME_BYTES: usize = MAX_STRING_BYTES;
    /// Most metadata contexts, whose names have at most [`Self::MAX_CONTEXT_NAME_BYTES`].
    pub const MAX_CONTEXTS: usize = 16;
    /// Longest name of a metadata context, namespace included. Names of bitmaps have up to 1023.
    pub const MAX_CONTEXT_NAME_BYTES: usize = 1100;

    /// A disk of `length` bytes under `name`, with all features, the usual block sizes and `base:allocation`.
    ///
    /// # Errors
    /// A name that is longer than the protocol carries, or has a control character.
    pub fn new(name: impl Into<Arc<str>>, length: Length, read_only: bool) -> Result<Self> {
        let name = name.into();
        check("name", &name, Self::MAX_NAME_BYTES, &name)?;
        Ok(Self {
            name,
            description: String::new(),
            length,
            read_only,
            features: Features::ALL,
            block_sizes: BlockSizes::DEFAULT,
            contexts: vec![MetaContext::Allocation],
        })
    }

    /// With a description for people.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn describe(mut self, description: impl Into<String>) -> Result<Self> {
        self.description = description.into();
        check("description", &self.description, Self::MAX_NAME_BYTES, &self.name)?;
        Ok(self)
    }

    /// With these metadata contexts instead.
    ///
    /// # Errors
    /// More than [`Self::MAX_CONTEXTS`], one twice, or a name that is too long.
    pub fn with_contexts(mut self, contexts: Vec<MetaContext>) -> Result<Self> {
        let refused = |reason: String| {
            Error::refused(Refusal::BadArgument, Operation::Parse, self.name.to_string(), reason)
        };
        if contexts.len() > Self::MAX_CONTEXTS {
            return Err(refused(format!("an export has at most {} metadata contexts", Self::MAX_CONTEXTS)));
        }
        for (index, context) in contexts.iter().enumerate() {
            check("metadata context", &context.name(), Self::MAX_CONTEXT_NAME_BYTES, &self.name)?;
            if contexts[..index].contains(context) {
                return Err(refused(format!("metadata context {context} is there twice")));
            }
        }
        self.contexts = contexts;
        Ok(self)
    }

    /// The name under which it is found.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// For people; may be empty.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Length of the disk.
    #[must_use]
    pub fn length(&self) -> Length {
        self.length
    }

    /// Whether it takes no writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What block status can be asked for.
    #[must_use]
    pub fn contexts(&self) -> &[MetaContext] {
        &self.contexts
    }

    /// The flags that a client gets with it.
    #[must_use]
    pub fn transmission_flags(&self, structured: bool) -> u16 {
        use wire::transmission as flag;
        let writable = !self.read_only;
        let Features { flush, trim, write_zeroes, fast_zero, cache, multi_conn, rotational } = self.features;
        [
            (true, flag::HAS_FLAGS),
            (self.read_only, flag::READ_ONLY),
            (writable && flush, flag::SEND_FLUSH | flag::SEND_FUA),
            (rotational, flag::ROTATIONAL),
            (writable && trim, flag::SEND_TRIM),
            (writable && write_zeroes, flag::SEND_WRITE_ZEROES),
            (structured, flag::SEND_DF),
            (multi_conn, flag::CAN_MULTI_CONN),
            (cache, flag::SEND_CACHE),
            (writable && write_zeroes && fast_zero, flag::SEND_FAST_ZERO),
        ]
        .into_iter()
        .fold(0, |flags, (set, bits)| if set { flags | bits } else { flags })
    }
}

fn check(what: &str, text: &str, most: usize, export: &str) -> Result<()> {
    let refused = |reason: String| {
        let shown: String = export.chars().take(64).collect();
        Err(Error::refused(Refusal::BadArgument, Operation::Parse, shown, reason)
            .advise("choose another one"))
    };
    if text.len() > most {
        return refused(format!("the {what} of an export has at most {most} bytes"));
    }
    if text.chars().any(char::is_control) {
        return refused(format!("the {what} of an export has no control characters"));
    }
    Ok(())
}

/// The exports of a server, as a connection asks for them. Names come from the peer: any text, at most 4096 bytes.
pub trait Exports {
    /// The export that a client means by `name`, if new clients may use it. The empty name means the default one, if there is one.
    fn find(&self, name: &str) -> Option<Arc<Export>>;

    /// The export whose name comes after `previous` in order (`None`: the first), of those that may be listed.
    fn after(&self, previous: Option<&str>) -> Option<Arc<Export>>;
}
