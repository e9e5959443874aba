//! `MPOOL.RELOAD`: looks at the account folder now.

use super::ReplyExt;
use crate::accounts::Outcome;
use crate::errors::Failure;
use crate::ffi::{Call, Command, Reply, Spec};
use crate::node;
use crate::pool::Tier;

pub(crate) struct Reload;

impl Command for Reload {
    const SPEC: Spec = Spec {
        name: c"mpool.reload",
        flags: c"write deny-script",
        acl: c"write slow admin",
        arity: 1,
        summary: c"Looks at the account folder now: accounts added and removed, each file that can't be used with its reason, and files that everybody may read",
        complexity: c"O(F) for F files, off the main thread",
        since: c"0.1.0",
        args: &[],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        if !call.may_block() {
            return Err(Failure::CannotWait);
        }
        node::prepare(&call.ctx)?;
        let asked = node::with_watcher(|watcher| {
            let client = call.block();
            watcher.rescan(Box::new(move |outcome| {
                client.reply(|reply| report(reply, &outcome))
            }));
        });
        asked.ok_or(Failure::NoWatcher)
    }
}

fn report(reply: &Reply, outcome: &Outcome) {
    reply.map(5);
    for (name, accounts) in [("added", &outcome.added), ("removed", &outcome.removed)] {
        reply.text(name);
        reply.array(accounts.len());
        for (tier, account) in accounts {
            reply.text(&format!("{tier}/{account}"));
        }
    }
    reply.text("invalid");
    reply.array(outcome.broken.len());
    for (tier, file, reason) in &outcome.broken {
        invalid_file(reply, *tier, file, reason);
    }
    // Nothing is removed for a folder that can't be read.
    let unreadable = Tier::ALL
        .into_iter()
        .zip(outcome.readable)
        .filter(|(_, readable)| !readable);
    let unreadable: Vec<Tier> = unreadable.map(|(tier, _)| tier).collect();
    reply.text("unreadable");
    reply.array(unreadable.len());
    for tier in unreadable {
        reply.text(tier.name());
    }
    reply.text("exposed");
    reply.array(outcome.exposed.len());
    for (tier, account) in &outcome.exposed {
        reply.text(&format!("{tier}/{account}"));
    }
}

/// One file that can't be used.
pub(super) fn invalid_file(reply: &Reply, tier: Tier, file: &str, reason: &str) {
    reply.map(3);
    reply.field_text("tier", Some(tier.name()));
    reply.field_text("file", Some(file));
    reply.field_text("reason", Some(reason));
}
