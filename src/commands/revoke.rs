//! `MPOOL.REVOKE key`: ends a client key.

use super::{KEY, ReplyExt};
use crate::errors::Failure;
use crate::ffi::{Call, Command, Spec};
use crate::node;

pub(crate) struct Revoke;

impl Command for Revoke {
    const SPEC: Spec = Spec {
        name: c"mpool.revoke",
        flags: c"write",
        acl: c"write fast",
        arity: 2,
        summary: c"Deactivates a client key and gives up its slot; revoking twice is no error",
        complexity: c"O(log N), N being the number of leases",
        since: c"0.1.0",
        args: &[KEY],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let key = super::key(call, 1)?;
        node::prepare(&call.ctx)?;
        let freed = node::with(|node| node.pool.revoke(key))??;
        node::apply(&call.ctx, &freed.effects)?;
        let reply = call.reply();
        reply.map(1);
        reply.field_text("account", freed.account.as_deref());
        Ok(())
    }
}
