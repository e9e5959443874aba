//! `MPOOL.REPAIR`: recomputes every counter and the view from the keyspace.

use super::ReplyExt;
use crate::errors::Failure;
use crate::ffi::{Call, Command, Reply, Spec};
use crate::node::{self, SETTLE_LIMIT};
use crate::rebuild::{self, Repaired};
use redis_module::{Context, ContextFlags};

pub(crate) struct Repair;

impl Command for Repair {
    const SPEC: Spec = Spec {
        name: c"mpool.repair",
        flags: c"write",
        acl: c"write slow admin",
        arity: 1,
        summary:
            c"Recomputes every counter and the view from the keyspace; says what it had to change",
        complexity: c"O(K) for all K keys of the database, a portion at a time between other commands; in MULTI or a script in one go",
        since: c"0.1.0",
        args: &[],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        // A writable replica's turns put nothing right, and without a watcher
        // nobody comes back to it once clients are paused.
        let is_primary = call.ctx.get_flags().contains(ContextFlags::MASTER);
        if is_primary && call.may_block() && node::with_watcher(|_| ()).is_some() {
            let client = call.block();
            return rebuild::begin(Box::new(move |outcome| {
                client.reply(|reply| match outcome {
                    Ok(repaired) => report(reply, repaired),
                    Err(failure) => reply.error(&failure),
                });
            }));
        }
        let repaired = at_once(&call.ctx)?;
        report(&call.reply(), repaired);
        Ok(())
    }
}

fn at_once(ctx: &Context) -> Result<Repaired, Failure> {
    if node::awaits_files() {
        return Err(Failure::Loading);
    }
    let rebuilt = node::rebuilt(ctx)?;
    let mut repaired = node::with(|node| {
        // One that nothing is answered from may be of another keyspace.
        let is_used = node::is_ready();
        let view = if is_used {
            node.pool.differences(&rebuilt)
        } else {
            0
        };
        node.adopt(rebuilt);
        Repaired {
            view,
            ..Repaired::default()
        }
    })?;
    while node::with(|node| node.pool.has_backlog())? {
        let effects = node::with(|node| node.pool.settle(SETTLE_LIMIT))?;
        repaired.count(&effects);
        node::apply(ctx, &effects)?;
    }
    Ok(repaired)
}

fn report(reply: &Reply, repaired: Repaired) {
    let Repaired {
        counters,
        leases,
        view,
    } = repaired;
    reply.map(4);
    reply.field_count("changed", view + counters + leases);
    reply.field_count("counters", counters);
    reply.field_count("leases", leases);
    reply.field_count("view", view);
}
