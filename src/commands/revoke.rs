//! `MPOOL.REVOKE key`: ends a client key.

use super::{KEY, ReplyExt};
use crate::errors::Failure;
use crate::ffi::{Blocked, Call, Command, Reply, Spec};
use crate::node;
use redis_module::Context;
use std::time::Duration;

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
        if call.may_block() {
            // Redis writes to its clients once a round of its loop, in any order.
            // A round later, whoever keeps leases in mind by client-side caching
            // has been told before the revoker reads that it is done. The first
            // timer still belongs to this round.
            let held = (call.block(), freed.account);
            call.ctx.create_timer(Duration::ZERO, next_round, held);
        } else {
            report(&call.reply(), freed.account.as_deref());
        }
        Ok(())
    }
}

type Held = (Blocked, Option<Box<str>>);

fn next_round(ctx: &Context, held: Held) {
    ctx.create_timer(Duration::from_millis(1), answer, held);
}

fn answer(_: &Context, (client, account): Held) {
    client.reply(|reply| report(reply, account.as_deref()));
}

fn report(reply: &Reply, account: Option<&str>) {
    reply.map(1);
    reply.field_text("account", account);
}
