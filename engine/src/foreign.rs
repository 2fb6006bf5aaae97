//! Calling code that is not ours: callbacks and wakers of embedders.
//!
//! Such code runs on threads that serve everybody else, the ring thread above all. A panic in it is its owner's bug and must be nobody
//! else's end: it is caught, told in the log, and forgotten. What it has to say about its own state is for itself to know.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Call it. `what`: how the log names it, should it panic.
pub(crate) fn call(what: &'static str, call: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(call)) {
        tracing::error!(panic = panic_text(panic.as_ref()), "{what} panicked");
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_stays_where_it_is() {
        call("a test", || panic!("as planned"));
        let mut called = false;
        call("a test", || called = true);
        assert!(called);
    }
}
