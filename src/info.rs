//! `INFO mpool`: counters since the module was loaded, and the pool as it is, which
//! is left out while it isn't known.

use crate::errors::CODES;
use crate::ffi;
use crate::node;
use crate::pool::Tier;
use redis_module::server_events::INFO_COMMAND_HANDLER_LIST;
use redis_module::{InfoContext, RedisError, RedisResult};

#[linkme::distributed_slice(INFO_COMMAND_HANDLER_LIST)]
static ON_INFO: fn(&InfoContext, bool) -> RedisResult<()> = info;

fn info(ctx: &InfoContext, for_crash_report: bool) -> RedisResult<()> {
    // A crash may have come from anywhere, the pool included.
    if for_crash_report {
        return Ok(());
    }
    ffi::guarded("INFO", || report(ctx)).unwrap_or(Ok(()))
}

fn report(ctx: &InfoContext) -> RedisResult<()> {
    let now = node::clock();
    let fields = node::with(|node| {
        let counters = &node.counters;
        let mut fields = vec![
            ("ready".to_owned(), node::is_ready().into()),
            ("acquires".to_owned(), counters.acquires),
            ("current".to_owned(), counters.current),
            ("bound".to_owned(), counters.bound),
            ("assignments".to_owned(), counters.assignments),
            ("rotations".to_owned(), counters.rotations),
            ("failovers".to_owned(), counters.failovers),
        ];
        let refusals = CODES.iter().zip(counters.refusals);
        fields.extend(refusals.map(|(code, count)| (format!("refused_{code}"), count)));
        if !node::is_ready() {
            // Somebody wants to know.
            ffi::ring();
            return fields;
        }
        let tiers = Tier::ALL.map(|tier| (tier, node.pool.summary(tier, now)));
        let sum =
            |part: fn(&crate::pool::Summary) -> u64| tiers.iter().map(|(_, tier)| part(tier)).sum();
        fields.push(("accounts".to_owned(), sum(|tier| tier.tally.accounts)));
        fields.push(("slots".to_owned(), sum(|tier| tier.slots)));
        fields.push(("leases".to_owned(), sum(|tier| tier.leases)));
        for (tier, summary) in tiers {
            fields.push((format!("{tier}_accounts"), summary.tally.accounts));
            fields.push((format!("{tier}_slots"), summary.slots));
            fields.push((format!("{tier}_used"), summary.tally.used));
            fields.push((format!("{tier}_free"), summary.tally.free));
            fields.push((format!("{tier}_cooling_down"), summary.tally.cooling));
            fields.push((format!("{tier}_expired"), summary.tally.expired));
            fields.push((format!("{tier}_invalid"), summary.tally.invalid));
        }
        fields
    });
    let fields = fields.map_err(|failure| RedisError::String(failure.to_string()))?;
    let mut section = ctx.builder().add_section("");
    for (name, value) in fields {
        section = section.field(&name, value)?;
    }
    section.build_section()?.build_info().map(drop)
}
