//! `MPOOL.CEILING`, with the feature `ceiling` alone: answers what an ACQUIRE
//! does and does nothing for it, so that benchmarks can say what an ACQUIRE
//! could cost at best.

use super::ReplyExt;
use crate::errors::Failure;
use crate::ffi::{Call, Command, Spec};

pub(crate) struct Ceiling;

impl Command for Ceiling {
    const SPEC: Spec = Spec {
        name: c"mpool.ceiling",
        flags: c"write",
        acl: c"write fast",
        arity: -3,
        summary: c"Answers with an ACQUIRE's map and does nothing",
        complexity: c"O(1)",
        since: c"0.1.0",
        args: &[],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let reply = call.reply();
        reply.map(5);
        reply.field_text("account", Some("account-000000"));
        reply.field_text("state", Some("current"));
        reply.field_text("previous_account", Some("account-000001"));
        reply.field_integer("last_rotation", Some(1_755_266_400_000));
        reply.field_integer("next_rotation", Some(1_755_352_800_000));
        Ok(())
    }
}
