//! A small upstream to try the forwarder against. It speaks enough of two
//! providers' formats for their official SDKs, and echoes the last user message,
//! in a stream word by word. `make run` starts it; by hand:
//!
//! ```sh
//! cargo run --example demo-upstream   # on 127.0.0.1:8090, its argument or MPOOL_DEMO_ADDR
//! curl -N http://127.0.0.1:8090/v1/messages -H 'x-api-key: any' \
//!   -d '{"stream": true, "messages": [{"role": "user", "content": "one two three"}]}'
//! ```
//!
//! - `POST /v1/messages`, `POST /v1/chat/completions`, `GET /v1/models`
//! - any other path answers what came: method, path, and each credential's kind
//!   and length; a credential itself is never shown
//! - the token `refused` is answered 401, so that a failover can be watched
//! - `MPOOL_DEMO_DELAY_MS`: the pause before each word, 100 unless told
//!
//! HTTP/1.1, and HTTP/2 without TLS. It handles no signals: SIGTERM and SIGINT
//! end it at once.

#![forbid(unsafe_code)]

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::error::Error;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

const DEFAULT_ADDRESS: &str = "127.0.0.1:8090";
const DEFAULT_DELAY: &str = "100";
const MAX_BODY: usize = 1024 * 1024;
/// The token that is answered 401.
const REFUSED: &[u8] = b"refused";

type Body = UnsyncBoxBody<Bytes, Infallible>;
/// An error's status and message.
type Failure = (StatusCode, &'static str);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let variable = |name, default: &str| std::env::var(name).unwrap_or(default.to_owned());
    let address = std::env::args().nth(1);
    let address = address.unwrap_or_else(|| variable("MPOOL_DEMO_ADDR", DEFAULT_ADDRESS));
    let delay = variable("MPOOL_DEMO_DELAY_MS", DEFAULT_DELAY).parse();
    let delay = Duration::from_millis(delay.map_err(|_| "MPOOL_DEMO_DELAY_MS is no number")?);
    let listener = TcpListener::bind(&address).await;
    let listener = listener.map_err(|error| format!("{address}: {error}"))?;
    println!("demo upstream on http://{}", listener.local_addr()?);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, delay));
            }
            // Too many open files, for example: that may pass.
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn serve(stream: TcpStream, delay: Duration) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| async move {
        let answer = answer(request, delay).await;
        Ok::<_, Infallible>(answer.unwrap_or_else(error))
    });
    let server = Builder::new(TokioExecutor::new());
    // How a connection ends is the client's concern.
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, delay: Duration) -> Result<Response<Body>, Failure> {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let credentials = credentials(&head.headers);
    let refused = credentials.iter().any(|(_, token)| *token == REFUSED);
    if refused || (path.starts_with("/v1/") && credentials.is_empty()) {
        return Err((
            StatusCode::UNAUTHORIZED,
            "the credential is missing or refused",
        ));
    }
    let script: fn(&Asked) -> Script = match (&head.method, path) {
        (&Method::POST, "/v1/messages") => messages,
        (&Method::POST, "/v1/chat/completions") => chat,
        (&Method::GET, "/v1/models") => return Ok(in_json(&models())),
        (method, path) => {
            let shown = |(kind, token): &(_, &[u8])| json!({ "kind": kind, "length": token.len() });
            let shown: Vec<_> = credentials.iter().map(shown).collect();
            let seen = json!({ "method": method.as_str(), "path": path, "credentials": shown });
            return Ok(in_json(&seen));
        }
    };
    let asked = Asked::read(body).await?;
    let script = script(&asked);
    if asked.stream {
        return Ok(in_events(script, asked.words, delay));
    }
    Ok(in_json(&script.whole))
}

/// The credentials that came, each with its kind.
fn credentials(headers: &HeaderMap) -> Vec<(&'static str, &[u8])> {
    let kinds = headers.iter().filter_map(|(name, value)| {
        let (name, value) = (name.as_str(), value.as_bytes());
        match name {
            "x-api-key" => Some(("x-api-key", value)),
            "authorization" => Some(("bearer", value.strip_prefix(b"Bearer ")?)),
            _ => None,
        }
    });
    kinds.collect()
}

/// What a request asks for.
struct Asked {
    model: String,
    stream: bool,
    /// The words of the last user message, each with the space after it.
    words: Vec<String>,
}

impl Asked {
    async fn read(body: Incoming) -> Result<Self, Failure> {
        let bad = |message| (StatusCode::BAD_REQUEST, message);
        let body = Limited::new(body, MAX_BODY).collect().await;
        let body = body.map_err(|failure| match failure.is::<LengthLimitError>() {
            true => (StatusCode::PAYLOAD_TOO_LARGE, "the body is over 1 MiB"),
            false => bad("the body broke off"),
        })?;
        let body: Result<Value, _> = serde_json::from_slice(&body.to_bytes());
        let body = body.map_err(|_| bad("the body is no JSON"))?;
        let mut messages = body["messages"].as_array().into_iter().flatten();
        let of_user = messages.rfind(|message| message["role"] == "user");
        let last = of_user.ok_or(bad("messages: none is of the user"))?;
        let parts = last["content"].as_array().into_iter().flatten();
        let parts = parts.filter_map(|part| part["text"].as_str());
        let text: String = last["content"].as_str().into_iter().chain(parts).collect();
        let words = text.split_inclusive(char::is_whitespace);
        Ok(Self {
            model: body["model"].as_str().unwrap_or("demo").to_owned(),
            stream: body["stream"] == true,
            words: words.map(str::to_owned).collect(),
        })
    }
}

/// What an API says: whole, or as the events before the words, one for each
/// word, and those after them.
struct Script {
    whole: Value,
    before: Vec<Value>,
    word: Box<dyn Fn(String) -> Value + Send>,
    after: Vec<Value>,
}

fn messages(asked: &Asked) -> Script {
    let count = asked.words.len();
    let message = |content: Value, reason: Option<&str>| {
        json!({
            "id": "msg_demo", "type": "message", "role": "assistant", "model": asked.model,
            "content": content, "stop_reason": reason, "stop_sequence": null,
            "usage": { "input_tokens": count, "output_tokens": reason.map_or(0, |_| count) },
        })
    };
    let text = |text: &str| json!({ "type": "text", "text": text });
    let stop = json!({ "stop_reason": "end_turn", "stop_sequence": null });
    Script {
        whole: message(json!([text(&asked.words.concat())]), Some("end_turn")),
        before: vec![
            json!({ "type": "message_start", "message": message(json!([]), None) }),
            json!({ "type": "content_block_start", "index": 0, "content_block": text("") }),
            json!({ "type": "ping" }),
        ],
        word: Box::new(|word| {
            let delta = json!({ "type": "text_delta", "text": word });
            json!({ "type": "content_block_delta", "index": 0, "delta": delta })
        }),
        after: vec![
            json!({ "type": "content_block_stop", "index": 0 }),
            json!({ "type": "message_delta", "delta": stop, "usage": { "output_tokens": count } }),
            json!({ "type": "message_stop" }),
        ],
    }
}

fn chat(asked: &Asked) -> Script {
    let (count, text, model) = (asked.words.len(), asked.words.concat(), asked.model.clone());
    let object = move |kind: &str, choices: Value| {
        json!({
            "id": "chatcmpl-demo", "object": kind, "created": 0, "model": model, "choices": choices,
        })
    };
    let message = json!({ "role": "assistant", "content": text, "refusal": null });
    let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
    let mut whole = object("chat.completion", json!([choice]));
    whole["usage"] = json!({
        "prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count,
    });
    let delta = move |delta: Value, reason: Option<&str>| {
        let choice = json!({ "index": 0, "delta": delta, "finish_reason": reason });
        object("chat.completion.chunk", json!([choice]))
    };
    let stop = delta(json!({}), Some("stop"));
    Script {
        whole,
        before: vec![delta(json!({ "role": "assistant", "content": "" }), None)],
        word: Box::new(move |word| delta(json!({ "content": word }), None)),
        after: vec![stop, json!("[DONE]")],
    }
}

/// A list in a form that both SDKs read.
fn models() -> Value {
    let model = json!({
        "id": "demo", "object": "model", "created": 0, "owned_by": "demo-upstream",
        "type": "model", "display_name": "Demo", "created_at": "1970-01-01T00:00:00Z",
    });
    json!({ "object": "list", "data": [model], "has_more": false, "first_id": "demo", "last_id": "demo" })
}

/// An error in a form that both SDKs read.
fn error((status, message): Failure) -> Response<Body> {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        _ => "invalid_request_error",
    };
    let error = json!({ "type": kind, "message": message, "param": null, "code": null });
    let mut answer = in_json(&json!({ "type": "error", "error": error }));
    *answer.status_mut() = status;
    answer
}

fn in_json(value: &Value) -> Response<Body> {
    let body = Full::from(format!("{value}\n"));
    in_form("application/json", body.boxed_unsync())
}

fn in_events(script: Script, words: Vec<String>, delay: Duration) -> Response<Body> {
    let at_once = |data: Value| (Duration::ZERO, data);
    let of_word = move |word| (delay, (script.word)(word));
    let before = script.before.into_iter().map(at_once);
    let after = script.after.into_iter().map(at_once);
    let events = before.chain(words.into_iter().map(of_word)).chain(after);
    let frames = stream::iter(events).then(|(delay, data)| async move {
        if !delay.is_zero() {
            sleep(delay).await;
        }
        let event = match (&data, data["type"].as_str()) {
            (Value::String(text), _) => format!("data: {text}\n\n"),
            (data, None) => format!("data: {data}\n\n"),
            (data, Some(name)) => format!("event: {name}\ndata: {data}\n\n"),
        };
        Ok(Frame::data(Bytes::from(event)))
    });
    in_form("text/event-stream", StreamBody::new(frames).boxed_unsync())
}

fn in_form(form: &'static str, body: Body) -> Response<Body> {
    let mut answer = Response::new(body);
    let form = HeaderValue::from_static(form);
    answer.headers_mut().insert(CONTENT_TYPE, form);
    answer
}
