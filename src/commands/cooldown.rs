//! `MPOOL.COOLDOWN tier account now ms [REASON text]`: takes an account out of
//! the pool for a while, or puts it back.

use super::{ACCOUNT, NOW, ReplyExt, TIER};
use crate::errors::Failure;
use crate::ffi::{Arg, ArgKind, Call, Command, Spec};
use crate::node;

/// The longest cooldown: ten years, in ms.
const MAX_COOLDOWN_MS: i64 = 315_360_000_000;

pub(crate) struct Cooldown;

impl Command for Cooldown {
    const SPEC: Spec = Spec {
        name: c"mpool.cooldown",
        flags: c"write",
        acl: c"write fast",
        arity: -5,
        summary: c"Takes an account out of the pool until now + ms, its holders moving on at their next acquire; 0 ms puts it back",
        complexity: c"O(H log N) for the account's H holders, N being the number of leases",
        since: c"0.1.0",
        args: &[
            TIER,
            ACCOUNT,
            NOW,
            Arg::new(c"ms", ArgKind::Integer),
            Arg::new(c"text", ArgKind::Text).token(c"REASON").optional(),
        ],
    };

    fn run(call: &Call<'_>) -> Result<(), Failure> {
        let tier = super::tier(call.arg(1))?;
        let account = super::account(call.arg(2))?;
        let now = super::now(call.arg(3))?;
        let ms = super::number(call.arg(4), 0, MAX_COOLDOWN_MS);
        let ms = ms.ok_or(Failure::Syntax(
            "ms must be a number of milliseconds from 0 to 315360000000",
        ))?;
        let [reason] = super::options(call, 5, ["REASON"])?;
        let expected = "REASON must be UTF-8 text of at most 256 bytes without control characters";
        let reason = reason
            .map(|reason| super::text(Some(reason), expected))
            .transpose()?;
        let until = (ms > 0).then(|| now.saturating_add(ms));

        node::prepare(&call.ctx)?;
        let freed = node::with(|node| node.pool.cool(tier, account, now, until, reason))??;
        node::apply_unless_full(&call.ctx, &freed.effects)?;
        let reply = call.reply();
        reply.map(3);
        reply.field_text("account", freed.account.as_deref());
        reply.field_integer("until", until);
        reply.field_count("freed", freed.slots as u64);
        Ok(())
    }
}
