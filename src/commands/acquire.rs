//! `MPOOL.ACQUIRE key now [WITHTOKEN]`: the account for a client key.

use super::{KEY, NOW, ReplyExt, SYNTAX};
use crate::errors::Failure;
use crate::ffi::{Arg, ArgKind, Call, Command, Reply, Spec};
use crate::node::{self, Node};
use crate::pool::{Decision, Refusal};
use secrecy::ExposeSecret;

pub(crate) struct Acquire;

impl Command for Acquire {
    const SPEC: Spec = Spec {
        name: c"mpool.acquire",
        flags: c"write",
        acl: c"write fast",
        arity: -3,
        summary: c"The account for a client key: its current lease, or a new one",
        complexity: c"O(1) for a current lease; O(log N) otherwise, N being the number of leases, and O(M) for M overdue leases freed, 64 at most",
        since: c"0.1.0",
        args: &[KEY, NOW, Arg::new(c"withtoken", ArgKind::Word).token(c"WITHTOKEN").optional()],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        run(call).inspect_err(|failure| {
            let _ = node::with(|node| node.counters.refused(failure));
        })
    }
}

fn run(call: &Call<'_>) -> Result<(), Failure> {
    let key = super::key(call, 1)?;
    let now = super::now(call.arg(2))?;
    let with_token = match call.arg(3) {
        None => false,
        Some(word) if call.len() == 4 && word.eq_ignore_ascii_case(b"WITHTOKEN") => true,
        Some(_) => return Err(SYNTAX),
    };
    node::prepare(&call.ctx)?;
    acquire(call, key, now, with_token)
}

fn acquire(call: &Call<'_>, key: &str, now: i64, with_token: bool) -> Result<(), Failure> {
    loop {
        let decided = node::with(|node| -> Result<Option<Decision>, Failure> {
            let decision = node.pool.acquire(key, now, &mut node.choice)?;
            if with_token && node.pool.credential(decision.account).is_none() {
                return Err(Failure::NoToken);
            }
            if decision.effects.is_empty() {
                node.counters.granted(decision.state);
                reply(&call.reply(), node, &decision, with_token);
                return Ok(None);
            }
            Ok(Some(decision))
        })?;
        let decision = match decided {
            Ok(None) => return Ok(()),
            Ok(Some(chosen)) => chosen,
            Err(failure) => {
                let full = matches!(
                    failure,
                    Failure::Refused(Refusal::PoolFull { .. } | Refusal::NoAccount { .. })
                );
                // What is still to be put right may hold the slot that is missing.
                if full && node::with(|node| node.pool.has_backlog())? {
                    node::settle(&call.ctx, node::SETTLE_LIMIT)?;
                    continue;
                }
                return Err(failure);
            }
        };
        node::apply_unless_full(&call.ctx, &decision.effects)?;
        return node::with(|node| {
            node.counters.granted(decision.state);
            reply(&call.reply(), node, &decision, with_token);
        });
    }
}

fn reply(reply: &Reply, node: &Node, decision: &Decision, with_token: bool) {
    let credential = node
        .pool
        .credential(decision.account)
        .filter(|_| with_token);
    reply.map(if credential.is_some() { 7 } else { 5 });
    reply.field_bytes("account", node.pool.account_bytes(decision.account));
    reply.field_text("state", Some(decision.state.name()));
    let previous = decision.previous;
    reply.field_bytes(
        "previous_account",
        previous.and_then(|id| node.pool.account_bytes(id)),
    );
    reply.field_integer("last_rotation", decision.last);
    reply.field_integer("next_rotation", decision.next);
    if let Some(credential) = credential {
        reply.field_text("token", Some(credential.token.expose_secret()));
        reply.field_text("auth", Some(credential.auth.name()));
    }
}
