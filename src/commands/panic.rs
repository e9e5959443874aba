//! `MPOOL.PANIC`, in debug builds alone: a panic on purpose, so that tests can
//! see what one does to the server.

use crate::errors::Failure;
use crate::ffi::{Call, Command, Spec};
use crate::node;

pub(crate) struct Panic;

impl Command for Panic {
    const SPEC: Spec = Spec {
        name: c"mpool.panic",
        flags: c"",
        acl: c"dangerous",
        arity: 1,
        summary: c"Panics while it holds the pool",
        complexity: c"O(1)",
        since: c"0.1.0",
        args: &[],
    };

    #[expect(clippy::panic, reason = "it is what this command is for")]
    fn run(_call: &Call<'_>) -> Result<(), Failure> {
        node::with(|_| panic!("100%s on purpose"))
    }
}
