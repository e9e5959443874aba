//! `MPOOL.KEYGEN tier POOL|account [DAYS n] [NAME text] [NOW ms]`: a new client
//! key.

use super::{ACCOUNT, NOW_OPTION, ReplyExt, TIER};
use crate::errors::Failure;
use crate::ffi::{Arg, ArgKind, Call, Command, Spec};
use crate::node;
use crate::pool::{Refusal, Tier, names};
use crate::store::{self, Registration};
use rand::TryRng;
use rand::rngs::SysRng;

const DEFAULT_DAYS: i64 = 30;
const MAX_DAYS: i64 = 36_500;
const DAY_MS: i64 = 86_400_000;

pub(crate) struct Keygen;

impl Command for Keygen {
    const SPEC: Spec = Spec {
        name: c"mpool.keygen",
        flags: c"write deny-oom",
        acl: c"write fast",
        arity: -3,
        summary: c"Makes a client key that uses the pool or is bound to one account",
        complexity: c"O(1)",
        since: c"0.1.0",
        args: &[
            TIER,
            Arg::new(
                c"target",
                ArgKind::OneOf(&[Arg::new(c"pool", ArgKind::Word).token(c"POOL"), ACCOUNT]),
            ),
            Arg::new(c"n", ArgKind::Integer).token(c"DAYS").optional(),
            Arg::new(c"text", ArgKind::Text).token(c"NAME").optional(),
            NOW_OPTION,
        ],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let tier = super::tier(call.arg(1))?;
        let account = match call.arg(2) {
            Some(word) if word.eq_ignore_ascii_case(b"POOL") => None,
            name => Some(super::account(name)?),
        };
        let [days, name, now] = super::options(call, 3, ["DAYS", "NAME", "NOW"])?;
        let days = days.map_or(Some(DEFAULT_DAYS), |days| {
            super::number(Some(days), 1, MAX_DAYS)
        });
        let days = days.ok_or(Failure::Syntax("DAYS must be a number from 1 to 36500"))?;
        let expected = "NAME must be UTF-8 text of at most 256 bytes without control characters";
        let name = name.map_or(Ok(""), |name| super::text(Some(name), expected))?;
        let created_at = now.map_or_else(|| Ok(node::clock()), |now| super::now(Some(now)))?;
        if account.is_none() && tier != Tier::Medium {
            return Err(Failure::Syntax(
                "high and supreme keys are always bound to one account, because of their request limits; name it",
            ));
        }
        node::prepare(&call.ctx)?;
        if let Some(account) = account
            && !node::with(|node| node.pool.has_account(tier, account))?
        {
            return Err(Refusal::NoSuchAccount.into());
        }
        let key = generate()?;
        let expires_at = created_at.saturating_add(days.saturating_mul(DAY_MS));
        let new = Registration {
            key: &key,
            tier,
            account,
            created_at,
            expires_at,
            name,
        };
        store::register(&call.ctx, &new)?;
        let reply = call.reply();
        reply.map(4);
        reply.field_text("key", Some(&key));
        reply.field_text("tier", Some(tier.name()));
        reply.field_text("account", Some(account.unwrap_or("pool")));
        reply.field_integer("expires_at", Some(expires_at));
        Ok(())
    }
}

/// The prefix and 64 hex digits from the operating system's random source.
fn generate() -> Result<String, Failure> {
    let mut bytes = [0_u8; 32];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|_| Failure::NoRandom)?;
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let digits = digits.filter_map(|digit| char::from_digit(u32::from(digit), 16));
    Ok(names::CLIENT_KEY_PREFIX.chars().chain(digits).collect())
}
