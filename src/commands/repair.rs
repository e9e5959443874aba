//! `MPOOL.REPAIR`: recomputes every counter and the view from the keyspace.

use super::ReplyExt;
use crate::errors::Failure;
use crate::ffi::{Call, Command, Spec};
use crate::node::{self, SETTLE_LIMIT};
use crate::pool::Effect;

pub(crate) struct Repair;

impl Command for Repair {
    const SPEC: Spec = Spec {
        name: c"mpool.repair",
        flags: c"write",
        acl: c"write slow admin",
        arity: 1,
        summary:
            c"Recomputes every counter and the view from the keyspace; says what it had to change",
        complexity: c"O(K) for all K keys of the database",
        since: c"0.1.0",
        args: &[],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let rebuilt = node::rebuilt(&call.ctx)?;
        let view = node::with(|node| {
            let differences = node.pool.differences(&rebuilt);
            node.pool = rebuilt;
            differences
        })?;
        let (mut counters, mut leases) = (0, 0);
        while node::with(|node| node.pool.has_backlog())? {
            let effects = node::with(|node| node.pool.settle(SETTLE_LIMIT))?;
            for effect in &effects {
                match effect {
                    Effect::Slots { .. } | Effect::Uncount { .. } | Effect::Leave { .. } => {
                        counters += 1
                    }
                    _ => leases += 1,
                }
            }
            node::apply(&call.ctx, &effects)?;
        }
        let reply = call.reply();
        reply.map(4);
        reply.field_count("changed", view + counters + leases);
        reply.field_count("counters", counters);
        reply.field_count("leases", leases);
        reply.field_count("view", view);
        Ok(())
    }
}
