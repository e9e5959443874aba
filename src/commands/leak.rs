//! `MPOOL.LEAK`, in debug builds alone: memory that nothing frees, so that
//! `make sanitize` can see that it would find some.

use crate::errors::Failure;
use crate::ffi::{Call, Command, Spec};

pub(crate) struct Leak;

impl Command for Leak {
    const SPEC: Spec = Spec {
        name: c"mpool.leak",
        flags: c"",
        acl: c"dangerous",
        arity: 1,
        summary: c"Leaks memory on purpose",
        complexity: c"O(1)",
        since: c"0.1.0",
        args: &[],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        // Several: a pointer to one may be left over on the stack.
        for _ in 0..10 {
            std::mem::forget(vec![1_u8; 100]);
        }
        call.reply().null();
        Ok(())
    }
}
