//! What the server would still do with the module's commands after an unload:
//! it frees them and forgets that connections point to them. CLIENT LIST reads
//! the last command of each, Redis 8 runs it again when it is asked for, and EXEC
//! runs what a transaction has queued. Such connections are closed instead.

use crate::ffi;
use redis_module::logging::RedisLogLevel;
use redis_module::{CallOptionsBuilder, CallReply, CallResult, Context};

/// Closes the connections that the server can't keep without the module.
pub(crate) fn close_connections(ctx: &Context) {
    let options = CallOptionsBuilder::new().errors_as_replies().build();
    let listed: CallResult<'_> = ctx.call_ext("CLIENT", &options, &["LIST"]);
    let listed = match listed {
        Ok(CallReply::String(text)) => text.as_bytes().to_vec(),
        Ok(CallReply::VerbatimString(text)) => match text.as_parts() {
            Some((_, text)) => text.to_vec(),
            None => return,
        },
        _ => return,
    };
    let mut closed = 0;
    for client in String::from_utf8_lossy(&listed).lines() {
        let Some(id) = field(client, "id").filter(|_| depends_on_the_module(client)) else {
            continue;
        };
        let result: CallResult<'_> = ctx.call_ext("CLIENT", &options, &["KILL", "ID", id]);
        closed += usize::from(result.is_ok());
    }
    if closed > 0 {
        let message = format!("{closed} connections that used the module are closed");
        ffi::log(RedisLogLevel::Notice, &message);
    }
}

/// Whether a line of CLIENT LIST is a connection's whose last command is the
/// module's, or who may have queued one.
fn depends_on_the_module(client: &str) -> bool {
    let last = field(client, "cmd").unwrap_or_default();
    let queued = field(client, "multi").and_then(|count| count.parse::<i64>().ok());
    // The one that unloads is still needed.
    let unloads = last.starts_with("module") || last == "exec";
    last.starts_with("mpool.") || (queued.is_some_and(|count| count > 0) && !unloads)
}

fn field<'a>(client: &'a str, name: &str) -> Option<&'a str> {
    client
        .split(' ')
        .find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_point_to_the_module_are_told_apart() {
        for (client, depends) in [
            ("id=7 name= multi=-1 cmd=mpool.acquire user=default", true),
            ("id=7 name=mpool.acquire multi=-1 cmd=get", false),
            ("id=7 name=cmd=mpool.acquire multi=-1 cmd=get", false),
            ("id=7 multi=2 cmd=ping", true),
            ("id=7 multi=0 cmd=multi", false),
            ("id=7 multi=-1 cmd=module|unload", false),
            ("id=7 multi=3 cmd=exec", false),
            ("id=7 multi=-1 cmd=NULL", false),
            ("", false),
        ] {
            assert_eq!(depends_on_the_module(client), depends, "{client}");
        }
        assert_eq!(field("id=7 name=x", "id"), Some("7"));
    }
}
