//! `MPOOL.RELEASE key [now]`: gives up a key's slot.

use super::{KEY, NOW, ReplyExt};
use crate::errors::Failure;
use crate::ffi::{Call, Command, Spec};
use crate::node;

pub(crate) struct Release;

impl Command for Release {
    const SPEC: Spec = Spec {
        name: c"mpool.release",
        flags: c"write",
        acl: c"write fast",
        arity: -2,
        summary: c"Gives up the slot that a client key holds; releasing twice is no error",
        complexity: c"O(log N), N being the number of leases, and O(M) for M overdue leases freed, 64 at most",
        since: c"0.1.0",
        args: &[KEY, NOW.optional()],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let key = super::key(call, 1)?;
        let now = match call.arg(2) {
            None => None,
            now if call.len() == 3 => Some(super::now(now)?),
            Some(_) => return Err(super::SYNTAX),
        };
        node::prepare(&call.ctx)?;
        let freed = node::with(|node| node.pool.release(key, now))??;
        node::apply(&call.ctx, &freed.effects)?;
        let reply = call.reply();
        reply.map(1);
        reply.field_text("account", freed.account.as_deref());
        Ok(())
    }
}
