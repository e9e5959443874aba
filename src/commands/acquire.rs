//! `MPOOL.ACQUIRE key now [WITHTOKEN]`: the account for a client key.

use super::{KEY, NOW, ReplyExt, SYNTAX};
use crate::errors::Failure;
use crate::ffi::{Arg, ArgKind, Call, Command, Spec};
use crate::node::{self, Node};
use crate::pool::{Decision, Effect, Refusal};
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
    let key = super::unchecked_key(call, 1);
    let now = super::now(call.arg(2))?;
    let with_token = match call.arg(3) {
        None => false,
        Some(word) if call.len() == 4 && word.eq_ignore_ascii_case(b"WITHTOKEN") => true,
        Some(_) => return Err(SYNTAX),
    };
    node::refresh(&call.ctx)?;
    if node::with(|node| answer_current(call, node, key, now, with_token))? {
        return Ok(());
    }
    choose(call, key, now, with_token)
}

/// A current lease is answered as it is: one look at the pool is all that it takes.
fn answer_current(
    call: &Call<'_>,
    node: &mut Node,
    key: &[u8],
    now: i64,
    with_token: bool,
) -> bool {
    if node.pool.has_backlog() {
        return false;
    }
    match node.pool.current(key, now) {
        Some(decision) if !with_token || node.pool.credential(decision.account).is_some() => {
            grant(call, node, decision, with_token);
            true
        }
        _ => false,
    }
}

#[inline(never)]
fn choose(call: &Call<'_>, key: &[u8], now: i64, with_token: bool) -> Result<(), Failure> {
    let mut prepared = false;
    loop {
        let step = node::with(|node| {
            let behind = node.pool.has_backlog();
            if behind && !std::mem::replace(&mut prepared, true) {
                return Ok(Step::Settle);
            }
            match node.pool.acquire(key, now, &mut node.choice) {
                Ok((decision, _))
                    if with_token && node.pool.credential(decision.account).is_none() =>
                {
                    Err(Failure::NoToken)
                }
                Ok((decision, effects)) if effects.is_empty() => {
                    grant(call, node, decision, with_token);
                    Ok(Step::Done)
                }
                Ok((decision, effects)) => Ok(Step::Write(decision, effects)),
                // What is still to be put right may hold the slot that is missing.
                Err(Refusal::PoolFull { .. } | Refusal::NoAccount { .. }) if behind => {
                    Ok(Step::Settle)
                }
                Err(Refusal::NoKey) => super::client_key(key).and(Err(Refusal::NoKey.into())),
                Err(refusal) => Err(refusal.into()),
            }
        })??;
        match step {
            Step::Done => return Ok(()),
            Step::Settle => drop(node::settle(&call.ctx, node::SETTLE_LIMIT)?),
            Step::Write(decision, effects) => {
                node::apply_unless_full(&call.ctx, &effects)?;
                return node::with(|node| grant(call, node, decision, with_token));
            }
        }
    }
}

/// What comes after a look at the pool.
enum Step {
    Done,
    /// Things are to be put right first.
    Settle,
    /// The decision is to be made true.
    Write(Decision, Vec<Effect>),
}

fn grant(call: &Call<'_>, node: &mut Node, decision: Decision, with_token: bool) {
    node.counters.granted(decision.state);
    let account = decision.account;
    let credential = if with_token {
        node.pool.credential(account)
    } else {
        None
    };
    let reply = call.reply();
    reply.map(if credential.is_some() { 7 } else { 5 });
    reply.field_bytes("account", node.pool.account_bytes(account));
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
