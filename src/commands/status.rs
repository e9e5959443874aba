//! `MPOOL.STATUS`: what the pool looks like; whole, by page, or one key.

use super::reload::invalid_file;
use super::{KEY, NOW_OPTION, ReplyExt, TIER};
use crate::background::BAD_NAME;
use crate::errors::Failure;
use crate::ffi::{Arg, ArgKind, Call, Command, Reply, Spec};
use crate::node::{self, Node};
use crate::pool::{AccountStatus, LeaseCursor, LeaseStatus, Refusal, Summary, Tier, names};
use crate::store;

/// Rows of a page unless told, and of each list in the whole.
const DEFAULT_COUNT: usize = 100;
const MAX_COUNT: i64 = 1000;

const CURSOR: Arg = Arg::new(c"cursor", ArgKind::Text)
    .token(c"CURSOR")
    .optional();
const COUNT: Arg = Arg::new(c"count", ArgKind::Integer)
    .token(c"COUNT")
    .optional();

pub(crate) struct Status;

impl Command for Status {
    const SPEC: Spec = Spec {
        name: c"mpool.status",
        flags: c"readonly",
        acl: c"read slow",
        arity: -1,
        summary: c"The pool in numbers with its first accounts and leases, a page of either, or one client key in full",
        complexity: c"O(N) for N rows shown",
        since: c"0.1.0",
        args: &[
            Arg::new(
                c"what",
                ArgKind::OneOf(&[
                    Arg::new(
                        c"accounts",
                        ArgKind::Block(&[Arg::new(c"accounts", ArgKind::Word).token(c"ACCOUNTS"), TIER]),
                    ),
                    Arg::new(
                        c"leases",
                        ArgKind::Block(&[Arg::new(c"leases", ArgKind::Word).token(c"LEASES"), TIER]),
                    ),
                    Arg::new(c"key", ArgKind::Block(&[Arg::new(c"key", ArgKind::Word).token(c"KEY"), KEY])),
                ]),
            )
            .optional(),
            NOW_OPTION,
            CURSOR,
            COUNT,
        ],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let word = |word: &str| {
            call.arg(1)
                .is_some_and(|arg| arg.eq_ignore_ascii_case(word.as_bytes()))
        };
        if word("KEY") {
            key(call)
        } else if word("ACCOUNTS") {
            accounts(call)
        } else if word("LEASES") {
            leases(call)
        } else {
            whole(call)
        }
    }
}

/// The instant to show the pool at. Asking changes nothing, so any will do.
fn now(bytes: Option<&[u8]>) -> Result<i64, Failure> {
    bytes.map_or_else(|| Ok(node::clock()), |now| super::instant(Some(now)))
}

fn count(bytes: Option<&[u8]>) -> Result<usize, Failure> {
    let Some(bytes) = bytes else {
        return Ok(DEFAULT_COUNT);
    };
    let count =
        super::number(Some(bytes), 1, MAX_COUNT).and_then(|count| usize::try_from(count).ok());
    count.ok_or(Failure::Syntax("COUNT must be a number from 1 to 1000"))
}

fn whole(call: &Call<'_>) -> Result<(), Failure> {
    let [at] = super::options(call, 1, ["NOW"])?;
    let now = now(at)?;
    node::refresh(&call.ctx)?;
    node::with(|node| {
        let tiers = Tier::ALL.map(|tier| (tier, node.pool.summary(tier, now)));
        let reply = call.reply();
        reply.map(7);
        reply.field_integer("now", Some(now));
        for (tier, summary) in tiers {
            reply.text(tier.name());
            summarise(&reply, &summary);
        }
        let mut rows = Vec::new();
        for tier in Tier::ALL {
            let left = DEFAULT_COUNT.saturating_sub(rows.len());
            rows.extend(node.pool.account_page(tier, now, 0, left).rows);
        }
        reply.text("accounts");
        account_rows(&reply, &rows);
        reply.text("leases");
        lease_rows(&reply, &node.pool.lease_page(None, DEFAULT_COUNT).rows);
        reply.text("invalid_files");
        invalid_files(&reply, node);
    })
}

fn summarise(reply: &Reply, summary: &Summary) {
    let tally = &summary.tally;
    reply.map(10);
    reply.field_count("accounts", tally.accounts);
    reply.field_count("slots", summary.slots);
    reply.field_count("used", tally.used);
    reply.field_count("free", tally.free);
    reply.field_count("cooling_down", tally.cooling);
    reply.field_count("invalid", tally.invalid);
    reply.field_count("leases", summary.leases);
    reply.field_integer("next_due", summary.next_due);
    reply.field_count("expired", tally.expired);
    reply.field_count("missing", tally.missing);
}

fn accounts(call: &Call<'_>) -> Result<(), Failure> {
    let tier = super::tier(call.arg(2))?;
    let [at, cursor, limit] = super::options(call, 3, ["NOW", "CURSOR", "COUNT"])?;
    let (now, limit) = (now(at)?, count(limit)?);
    let cursor = cursor.map_or(Some(0), |cursor| {
        super::number(Some(cursor), 0, i64::from(u32::MAX))
    });
    let cursor = cursor.and_then(|cursor| u64::try_from(cursor).ok());
    let cursor = cursor.ok_or(Failure::Syntax(
        "CURSOR must be 0 or what the page before ended with",
    ))?;
    node::refresh(&call.ctx)?;
    node::with(|node| {
        let page = node.pool.account_page(tier, now, cursor, limit);
        let reply = call.reply();
        reply.map(2);
        reply.text("accounts");
        account_rows(&reply, &page.rows);
        reply.field_text("cursor", Some(&page.next.unwrap_or(0).to_string()));
    })
}

fn leases(call: &Call<'_>) -> Result<(), Failure> {
    let tier = super::tier(call.arg(2))?;
    let [at, cursor, limit] = super::options(call, 3, ["NOW", "CURSOR", "COUNT"])?;
    let (_, limit) = (now(at)?, count(limit)?);
    let after = match cursor {
        None | Some(b"0") => None,
        Some(text) => {
            let text = std::str::from_utf8(text).ok();
            let cursor = text.and_then(LeaseCursor::parse);
            Some(cursor.ok_or(Failure::Syntax(
                "CURSOR must be 0 or what the page before ended with",
            ))?)
        }
    };
    node::refresh(&call.ctx)?;
    node::with(|node| {
        // Only the pooled tier has leases.
        let limit = if tier.is_pooled() { limit } else { 0 };
        let page = node.pool.lease_page(after, limit);
        let next = page
            .next
            .filter(|_| tier.is_pooled())
            .map_or_else(|| "0".to_owned(), |next| next.to_string());
        let reply = call.reply();
        reply.map(2);
        reply.text("leases");
        lease_rows(&reply, &page.rows);
        reply.field_text("cursor", Some(&next));
    })
}

fn account_rows(reply: &Reply, rows: &[AccountStatus<'_>]) {
    reply.array(rows.len());
    for row in rows {
        reply.map(7);
        reply.field_text("account", Some(row.name));
        reply.field_text("tier", Some(row.tier.name()));
        reply.field_count("used", row.used);
        reply.field_count("slots", row.slots);
        reply.field_text("state", Some(row.state));
        reply.field_text("reason", row.reason);
        reply.field_integer("until", row.until);
    }
}

fn lease_rows(reply: &Reply, rows: &[LeaseStatus<'_>]) {
    reply.array(rows.len());
    for row in rows {
        reply.map(6);
        reply.field_text("key", Some(&row.key));
        reply.field_text("tier", Some(row.tier.name()));
        reply.field_text("account", Some(row.account));
        reply.field_integer("next_rotation", row.next);
        reply.field_integer("last_rotation", row.last);
        reply.field_text("previous_account", row.previous);
    }
}

/// Account files that can't be used: by content, then by name.
fn invalid_files(reply: &Reply, node: &Node) {
    let by_content = node.pool.invalid_files(DEFAULT_COUNT);
    let by_name = node
        .bad_names
        .keys()
        .take(DEFAULT_COUNT.saturating_sub(by_content.len()));
    reply.array(by_content.len() + by_name.len());
    for (tier, name, reason) in by_content {
        invalid_file(reply, tier, &format!("{name}.json"), reason);
    }
    for (tier, file) in by_name {
        invalid_file(reply, *tier, file, BAD_NAME);
    }
}

fn key(call: &Call<'_>) -> Result<(), Failure> {
    let key = super::key(call, 2)?;
    let [at] = super::options(call, 3, ["NOW"])?;
    let now = now(at)?;
    node::refresh(&call.ctx)?;
    let [created_at, label] = store::read_label(&call.ctx, key);
    let created_at = created_at.and_then(|text| super::number(Some(&text), 0, i64::MAX));
    node::with(|node| {
        let status = node.pool.key_status(key, now).ok_or(Refusal::NoKey)?;
        let reply = call.reply();
        reply.map(11);
        reply.field_text("key", Some(&names::mask(key)));
        reply.field_text("tier", Some(status.tier.name()));
        reply.field_text("state", Some(status.state.name()));
        reply.field_text("account", status.account);
        reply.field_text("previous_account", status.previous);
        reply.field_integer("last_rotation", status.last);
        reply.field_integer("next_rotation", status.next);
        reply.field_integer("created_at", created_at);
        reply.field_integer("expires_at", status.expires_at);
        reply.text("name");
        match &label {
            Some(label) => reply.bytes(label),
            None => reply.null(),
        }
        reply.field_text("flaw", status.flaw);
        Ok(())
    })?
}
