//! The guide comes true: each line of docs/GUIDE.zh.md that is no heading is
//! listed below with the tests that prove it, its commands are run as typed, its
//! 24 hours pass as numbers, and what it says of requests, answers and logs is
//! looked for in the forwarder's.

mod proxy;
mod support;
mod typed;

use proxy::{Forwarder, Upstream};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};
use support::{Client, DAY, Lease, Options, Server, bearer, text, wait_for};
use typed::{Terminal, key_in, text_of};

/// The guide's lines, in its order, and what proves each.
const LINES: &[(&str, &[&str])] = &[
    // 功能概述
    (
        "Medium级别密钥支持智能账户池模式：",
        &[
            "a_key_marked_use_pool_true_uses_the_pool",
            "only_medium_has_a_pool",
        ],
    ),
    (
        "- 每个账户有**2个占用位置**上限",
        &["an_account_is_lent_to_two_keys_at_most"],
    ),
    (
        "- 密钥首次使用时自动分配到未满的账户",
        &["a_first_use_gets_an_account_that_is_not_full"],
    ),
    (
        "- 每24小时轮换时，重新选择可用账户",
        &["each_key_rotates_24_hours_after_its_own_last_rotation"],
    ),
    (
        "- 自动管理账户占用状态，确保负载均衡",
        &["new_and_rotating_keys_get_the_least_used_account"],
    ),
    // 生成账户池密钥
    (
        "cd shell",
        &[
            "medium_sh_makes_a_pool_key",
            "pool_status_shows_bars_totals_and_countdowns",
        ],
    ),
    ("./medium.sh", &["medium_sh_makes_a_pool_key"]),
    ("# 或", &["medium_sh_makes_a_pool_key"]),
    ("./medium.sh pool", &["medium_sh_makes_a_pool_key"]),
    (
        "./medium.sh pool 60  # 生成60天有效期的账户池密钥",
        &["medium_sh_pool_60_makes_a_key_for_60_days"],
    ),
    (
        "如果您仍想将密钥绑定到特定账户：",
        &["medium_sh_with_an_account_binds_the_key"],
    ),
    (
        "./medium.sh jasonlucy8160-outlook      # 绑定到特定账户",
        &["medium_sh_with_an_account_binds_the_key"],
    ),
    (
        "./medium.sh jasonlucy8160-outlook 30   # 绑定到特定账户，30天有效期",
        &["medium_sh_with_an_account_binds_the_key"],
    ),
    // 账户池工作原理
    (
        "1. **密钥识别**：系统检测到密钥的`use_pool`标记为`true`时，启用账户池模式",
        &[
            "a_key_marked_use_pool_true_uses_the_pool",
            "medium_sh_makes_a_pool_key",
        ],
    ),
    (
        "2. **占用位置管理**：",
        &["the_slots_key_counts_an_accounts_holders"],
    ),
    (
        "- 每个账户最多被2个密钥同时占用",
        &["an_account_is_lent_to_two_keys_at_most"],
    ),
    (
        "- Redis中记录每个账户的占用数：`medium_pool:slots:{account_name}`",
        &["the_slots_key_counts_an_accounts_holders"],
    ),
    (
        "- 新密钥或轮换时，选择占用最少的账户",
        &["new_and_rotating_keys_get_the_least_used_account"],
    ),
    (
        "3. **24小时轮换机制**：",
        &["each_key_rotates_24_hours_after_its_own_last_rotation"],
    ),
    (
        "- 每个密钥独立计时，24小时后触发轮换",
        &["each_key_rotates_24_hours_after_its_own_last_rotation"],
    ),
    (
        "- 轮换时释放旧账户的占用位置",
        &["a_rotation_frees_the_old_slot_and_counts_the_new_one"],
    ),
    (
        "- 重新选择占用最少的可用账户",
        &["new_and_rotating_keys_get_the_least_used_account"],
    ),
    (
        "- 更新占用计数",
        &["a_rotation_frees_the_old_slot_and_counts_the_new_one"],
    ),
    (
        "4. **智能分配算法**：",
        &["accounts_with_no_slot_in_use_come_first_then_those_with_one"],
    ),
    (
        "- 优先选择占用数为0的账户",
        &["accounts_with_no_slot_in_use_come_first_then_those_with_one"],
    ),
    (
        "- 其次选择占用数为1的账户",
        &["accounts_with_no_slot_in_use_come_first_then_those_with_one"],
    ),
    (
        "- 所有账户满载时返回503错误",
        &[
            "a_request_to_a_full_pool_is_answered_503_with_the_time_of_the_next_slot",
            "a_full_pool_is_refused_with_the_time_of_the_next_slot",
        ],
    ),
    (
        "5. **自动故障恢复**：",
        &["a_deleted_account_file_gives_up_its_slots_and_its_holders_move_on"],
    ),
    (
        "- 账户文件删除时自动释放占用并选择新账户",
        &["a_deleted_account_file_gives_up_its_slots_and_its_holders_move_on"],
    ),
    (
        "- 透明切换，客户端无感知",
        &[
            "clients_notice_nothing_of_an_account_whose_file_is_deleted",
            "clients_notice_nothing_of_a_token_that_the_upstream_refuses",
        ],
    ),
    // 配置账户池
    (
        "将账户JSON文件放入`/account/medium/`目录：",
        &["an_account_file_that_is_copied_in_joins_the_pool"],
    ),
    (
        "cp /path/to/account.json /home/leon/claude-route-ssl/claude-route-ssl/account/medium/",
        &["an_account_file_that_is_copied_in_joins_the_pool"],
    ),
    (
        "ls -la /home/leon/claude-route-ssl/claude-route-ssl/account/medium/",
        &["the_pools_accounts_are_the_files_that_ls_lists"],
    ),
    // 优势
    (
        "- **负载均衡**：每24小时自动轮换账户，均衡使用",
        &[
            "new_and_rotating_keys_get_the_least_used_account",
            "each_key_rotates_24_hours_after_its_own_last_rotation",
        ],
    ),
    (
        "- **统一管理**：同级别密钥使用相同账户，便于管理",
        &["keys_of_a_tier_share_the_accounts_of_its_folder"],
    ),
    (
        "- **高可用性**：账户故障时自动切换到下一个",
        &[
            "a_deleted_account_file_gives_up_its_slots_and_its_holders_move_on",
            "a_troubled_account_is_replaced_by_another",
            "clients_notice_nothing_of_a_token_that_the_upstream_refuses",
        ],
    ),
    (
        "- **简化配置**：无需为每个密钥指定账户",
        &["medium_sh_makes_a_pool_key"],
    ),
    (
        "- **可预测性**：24小时固定周期，便于维护",
        &["each_key_rotates_24_hours_after_its_own_last_rotation"],
    ),
    // 监控日志
    (
        "账户池使用情况会记录在日志中：",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    (
        "# 首次选择或轮换账户时",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    (
        "[2025-08-14T14:00:00.000Z] 🔄 Pool: Rotated to account: account-name (will rotate in 24 hours)",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    (
        "[2025-08-14T14:00:00.100Z] 📝 Previous account was: previous-account",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    (
        "# 继续使用当前账户时",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    (
        "[2025-08-14T15:00:00.000Z] 📌 Pool: Using current account: account-name (23 hours until rotation)",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    (
        "[2025-08-14T15:00:00.100Z] ✅ Successfully obtained token from pool account: account-name",
        &["the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account"],
    ),
    // 查看账户池状态
    (
        "./pool-status.sh",
        &["pool_status_shows_bars_totals_and_countdowns"],
    ),
    ("显示：", &["pool_status_shows_bars_totals_and_countdowns"]),
    (
        "- 每个账户的占用状态（可视化进度条）",
        &["pool_status_shows_bars_totals_and_countdowns"],
    ),
    (
        "- 总体使用统计",
        &["pool_status_shows_bars_totals_and_countdowns"],
    ),
    (
        "- 活跃密钥的轮换倒计时",
        &["pool_status_shows_bars_totals_and_countdowns"],
    ),
    (
        "查看账户占用情况：",
        &["the_manual_queries_show_slots_in_use"],
    ),
    (
        "# 查看特定账户的占用数",
        &["the_manual_queries_show_slots_in_use"],
    ),
    (
        r#"redis-cli -p 6380 get "medium_pool:slots:account_name""#,
        &["the_manual_queries_show_slots_in_use"],
    ),
    (
        "# 查看所有账户占用",
        &["the_manual_queries_show_slots_in_use"],
    ),
    (
        r#"redis-cli -p 6380 keys "medium_pool:slots:*" | xargs -I {} sh -c 'echo -n "{}: "; redis-cli -p 6380 get "{}"'"#,
        &["the_manual_queries_show_slots_in_use"],
    ),
    (
        "查看密钥轮换状态：",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        "# 查看特定密钥的轮换信息",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        r#"redis-cli -p 6380 hgetall "key_rotation:sk-cli-v1-xxxxx""#,
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        "返回信息：",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        "- `account`: 当前使用的账户",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        "- `next_rotation`: 下次轮换时间（毫秒时间戳）",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        "- `last_rotation`: 上次轮换时间",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    (
        "- `previous_account`: 上一个账户",
        &["the_manual_query_of_a_key_shows_its_rotation"],
    ),
    // 限制
    ("- 仅Medium级别支持账户池", &["only_medium_has_a_pool"]),
    (
        "- High和Supreme级别仍需绑定特定账户（因为有请求限制）",
        &["only_medium_has_a_pool"],
    ),
    (
        "- 账户池要求`/account/medium/`目录至少有一个有效账户",
        &["a_pool_without_a_valid_account_lends_nothing"],
    ),
    // 示例场景
    (
        "生成一个账户池密钥，团队成员共享使用，系统自动从多个账户中轮换。",
        &["one_key_shared_by_a_team_moves_through_several_accounts"],
    ),
    (
        "为API服务生成账户池密钥，实现请求自动分散到多个Claude账户。",
        &["the_keys_of_a_service_are_spread_over_the_accounts"],
    ),
    (
        "使用账户池，即使某个账户token过期或出现问题，其他账户仍可正常服务。",
        &[
            "a_troubled_account_is_replaced_by_another",
            "clients_notice_nothing_of_a_token_that_the_upstream_refuses",
            "clients_notice_nothing_of_a_token_that_expires",
        ],
    ),
];

const GUIDE: &str = "docs/GUIDE.zh.md";
/// What the guide calls the repository's folder.
const ROOT: &str = "/home/leon/claude-route-ssl/claude-route-ssl";
/// 2025-08-14T14:00:00Z, the time of the guide's first log line.
const START: i64 = 1_755_180_000_000;
const HOUR: i64 = 3_600_000;

/// The lines of the guide that say something: no headings, no code fences.
fn lines_of_the_guide() -> Vec<String> {
    let mut in_code = false;
    let mut lines = Vec::new();
    for line in text_of(GUIDE).lines().map(str::trim) {
        if line.starts_with("```") {
            in_code = !in_code;
        } else if !line.is_empty() && (in_code || !line.starts_with('#')) {
            lines.push(line.to_owned());
        }
    }
    lines
}

/// The test functions in tests/*.rs.
fn test_functions() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(support::repository().join("tests")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let source = fs::read_to_string(path).unwrap();
        for (_, after) in source
            .split("#[test]")
            .skip(1)
            .filter_map(|rest| rest.split_once("fn "))
        {
            names.extend(after.split_once('(').map(|(name, _)| name.to_owned()));
        }
    }
    names
}

#[test]
fn every_line_of_the_guide_has_its_proof() {
    let guide = lines_of_the_guide();
    let listed: BTreeSet<&str> = LINES.iter().map(|(line, _)| *line).collect();
    for line in &guide {
        assert!(
            listed.contains(line.as_str()),
            "nothing proves this line of the guide: {line}"
        );
    }
    for (line, _) in LINES {
        assert!(
            guide.iter().any(|found| found == line),
            "the guide has no such line: {line}"
        );
    }
    let tests = test_functions();
    for (line, proofs) in LINES {
        assert!(!proofs.is_empty(), "nothing proves: {line}");
        for proof in *proofs {
            assert!(
                tests.contains(*proof),
                "there is no test {proof}, which is to prove: {line}"
            );
        }
    }
}

/// A line that the guide has, as it is typed in the test's folder.
#[track_caller]
fn as_typed(line: &str, terminal: &Terminal) -> String {
    assert!(
        LINES.iter().any(|(listed, _)| *listed == line),
        "the guide has no such line: {line}"
    );
    line.replace(ROOT, terminal.folder().to_str().unwrap())
}

fn pool_of(accounts: &[&str]) -> (Server, Client) {
    let server = Options::default().accounts(accounts).start();
    let client = server.connect();
    (server, client)
}

fn record(client: &mut Client, key: &str) -> BTreeMap<String, String> {
    client.run(&["HGETALL", &format!("client_keys:{key}")])
}

#[track_caller]
fn assert_lasts(record: &BTreeMap<String, String>, days: i64) {
    let time = |field: &str| record[field].parse::<i64>().unwrap();
    assert_eq!(time("expires_at") - time("created_at"), days * DAY);
}

/// Slots in use, by account.
fn occupancy(client: &mut Client) -> BTreeMap<String, u64> {
    let keys: Vec<String> = client.run(&["KEYS", "medium_pool:slots:*"]);
    let accounts = keys
        .iter()
        .map(|key| key["medium_pool:slots:".len()..].to_owned());
    accounts
        .map(|account| (account.clone(), client.slots(&account).unwrap()))
        .collect()
}

/// Acquires for a key that must choose, and checks the choice and the counters.
#[track_caller]
fn acquire_least_used(client: &mut Client, key: &str, now: i64) -> Lease {
    let mut expected = occupancy(client);
    let held: Option<String> = client.run(&["HGET", &format!("key_rotation:{key}"), "account"]);
    if let Some(held) = &held {
        *expected.get_mut(held).unwrap() -= 1;
    }
    let least = *expected.values().min().unwrap();
    let lease = client.acquire(key, now);
    assert_ne!(lease.state, "current");
    assert_eq!(
        expected[&lease.account], least,
        "{} of {expected:?}",
        lease.account
    );
    let ties = expected.values().filter(|used| **used == least).count();
    if ties > 1 {
        assert_ne!(
            held.as_ref(),
            Some(&lease.account),
            "the same account again, of {ties}"
        );
    }
    *expected.get_mut(&lease.account).unwrap() += 1;
    assert_eq!(occupancy(client), expected);
    lease
}

#[test]
fn a_key_marked_use_pool_true_uses_the_pool() {
    let (_server, mut client) = pool_of(&["one", "two"]);
    let register = |client: &mut Client, key: &str, marks: &[&str]| {
        let mut words = vec![
            "HSET".to_owned(),
            format!("client_keys:{key}"),
            "tier".into(),
            "medium".into(),
        ];
        words.extend(
            ["active", "true"]
                .iter()
                .chain(marks)
                .map(ToString::to_string),
        );
        client.ok(&words.iter().map(String::as_str).collect::<Vec<_>>());
    };
    register(&mut client, "pooled", &["use_pool", "true"]);
    register(
        &mut client,
        "bound",
        &["use_pool", "false", "account_name", "two"],
    );
    let lease = client.acquire("pooled", START);
    assert_eq!(
        (lease.state.as_str(), lease.next),
        ("assigned", Some(START + DAY))
    );
    let lease = client.acquire("bound", START);
    assert_eq!(
        (lease.state.as_str(), lease.account.as_str(), lease.next),
        ("bound", "two", None)
    );
    assert_eq!(
        occupancy(&mut client).values().sum::<u64>(),
        1,
        "a bound key takes no slot"
    );
}

#[test]
fn an_account_is_lent_to_two_keys_at_most() {
    let (_server, mut client) = pool_of(&["one"]);
    let keys = [client.pool_key(), client.pool_key(), client.pool_key()];
    assert_eq!(client.acquire(&keys[0], START).account, "one");
    assert_eq!(client.acquire(&keys[1], START).account, "one");
    assert!(
        client
            .try_acquire(&keys[2], START)
            .unwrap_err()
            .starts_with("POOLFULL")
    );
    assert_eq!(client.slots("one"), Some(2));
    client.check_invariants(2);
}

#[test]
fn a_first_use_gets_an_account_that_is_not_full() {
    let (server, mut client) = pool_of(&["full"]);
    for _ in 0..2 {
        let key = client.pool_key();
        client.acquire(&key, START);
    }
    server.write_account("medium/open", &bearer("open"));
    wait_for("the second account", || client.slots("open"));
    let key = client.pool_key();
    assert_eq!(
        client.run::<i64>(&["EXISTS", &format!("key_rotation:{key}")]),
        0,
        "before its first use it holds nothing"
    );
    let lease = client.acquire(&key, START);
    assert_eq!(
        (lease.account.as_str(), lease.state.as_str()),
        ("open", "assigned")
    );
}

#[test]
fn the_slots_key_counts_an_accounts_holders() {
    let (_server, mut client) = pool_of(&["account_name"]);
    let keys = [client.pool_key(), client.pool_key()];
    let mut seen = Vec::new();
    let mut look = |client: &mut Client| {
        seen.push(
            client
                .run::<Option<String>>(&["GET", "medium_pool:slots:account_name"])
                .unwrap(),
        );
    };
    look(&mut client);
    for key in &keys {
        client.acquire(key, START);
        look(&mut client);
    }
    client.ok(&["MPOOL.RELEASE", &keys[0]]);
    look(&mut client);
    client.ok(&["MPOOL.REVOKE", &keys[1]]);
    look(&mut client);
    assert_eq!(seen, ["0", "1", "2", "1", "0"]);
}

#[test]
fn new_and_rotating_keys_get_the_least_used_account() {
    let (_server, mut client) = pool_of(&["a", "b", "c", "d", "e"]);
    let keys: Vec<String> = (0..9).map(|_| client.pool_key()).collect();
    for day in 0..8 {
        for (hour, key) in (0_i64..).zip(&keys) {
            let lease = acquire_least_used(&mut client, key, START + day * DAY + hour * HOUR);
            assert_eq!(lease.state, if day == 0 { "assigned" } else { "rotated" });
        }
    }
    client.check_invariants(2);
}

#[test]
fn accounts_with_no_slot_in_use_come_first_then_those_with_one() {
    let (_server, mut client) = pool_of(&["a", "b", "c"]);
    for round in 0..2 {
        for _ in 0..3 {
            let key = client.pool_key();
            let before = occupancy(&mut client);
            let lease = client.acquire(&key, START);
            assert_eq!(before[&lease.account], round, "{before:?}");
        }
    }
    let key = client.pool_key();
    assert!(client.try_acquire(&key, START).is_err());
}

#[test]
fn each_key_rotates_24_hours_after_its_own_last_rotation() {
    let (_server, mut client) = pool_of(&["one", "two", "three"]);
    let (early, late) = (client.pool_key(), client.pool_key());
    let mut starts = [(early, START), (late, START + HOUR)];
    for (key, start) in &starts {
        client.acquire(key, *start);
    }
    for _ in 0..3 {
        for (key, start) in &mut starts {
            let last = client.acquire(key, *start + DAY - 1);
            assert_eq!(
                (last.state.as_str(), last.next),
                ("current", Some(*start + DAY))
            );
            let lease = client.acquire(key, *start + DAY);
            assert_eq!(lease.state, "rotated");
            assert_ne!(lease.account, last.account);
            assert_eq!(
                (lease.last, lease.next),
                (Some(*start + DAY), Some(*start + 2 * DAY))
            );
            *start += DAY;
        }
    }
}

#[test]
fn a_rotation_frees_the_old_slot_and_counts_the_new_one() {
    let (_server, mut client) = pool_of(&["one", "two"]);
    let key = client.pool_key();
    let old = client.acquire(&key, START).account;
    assert_eq!(client.slots(&old), Some(1));
    let lease = client.acquire(&key, START + DAY);
    assert_ne!(lease.account, old);
    assert_eq!(
        (client.slots(&old), client.slots(&lease.account)),
        (Some(0), Some(1))
    );
    assert_eq!(lease.previous, Some(old));
}

#[test]
fn a_full_pool_is_refused_with_the_time_of_the_next_slot() {
    let (_server, mut client) = pool_of(&["one", "two"]);
    for hour in 0..4 {
        let key = client.pool_key();
        client.acquire(&key, START + hour * HOUR);
    }
    let key = client.pool_key();
    let error = client.try_acquire(&key, START + 5 * HOUR).unwrap_err();
    let words: Vec<&str> = error.split(' ').collect();
    assert_eq!(
        (words[0], *words.last().unwrap()),
        ("POOLFULL", (START + DAY).to_string().as_str())
    );
    // And at that time it is let in.
    assert_eq!(client.acquire(&key, START + DAY).state, "assigned");
}

#[test]
fn a_deleted_account_file_gives_up_its_slots_and_its_holders_move_on() {
    let (server, mut client) = pool_of(&["doomed"]);
    let keys = [client.pool_key(), client.pool_key()];
    for key in &keys {
        client.acquire(key, START);
    }
    server.write_account("medium/other", &bearer("other"));
    wait_for("the other account", || client.slots("other"));
    server.remove_account("medium/doomed");
    for key in &keys {
        // No acquire fails on the way: the first that differs is of the other account.
        let lease = wait_for("the move", || {
            let lease = client.acquire(key, START + HOUR);
            (lease.account != "doomed").then_some(lease)
        });
        assert_eq!(
            (lease.account.as_str(), lease.state.as_str()),
            ("other", "failover")
        );
        assert_eq!(lease.previous.as_deref(), Some("doomed"));
    }
    assert_eq!(
        (client.slots("doomed"), client.slots("other")),
        (None, Some(2))
    );
}

#[test]
fn a_troubled_account_is_replaced_by_another() {
    let server = Options::default()
        .file(
            "medium/expiring",
            &format!(r#"{{"access_token": "x", "expires_at": {}}}"#, START + HOUR),
        )
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    assert_eq!(client.acquire(&key, START).account, "expiring");
    server.write_account("medium/sound", &bearer("sound"));
    server.write_account("medium/spare", &bearer("spare"));
    wait_for("the others", || {
        client.slots("sound").and(client.slots("spare"))
    });
    assert_eq!(client.acquire(&key, START + HOUR - 1).account, "expiring");
    // Its token expires;
    let second = client.acquire(&key, START + HOUR);
    assert_eq!(second.state, "failover");
    assert_ne!(second.account, "expiring");
    // and a proxy reports that the next one has a problem.
    client.ok(&[
        "MPOOL.COOLDOWN",
        "medium",
        &second.account,
        &(START + 2 * HOUR).to_string(),
        "600000",
    ]);
    let third = client.acquire(&key, START + 2 * HOUR);
    assert_eq!(third.state, "failover");
    assert!(!["expiring", second.account.as_str()].contains(&third.account.as_str()));
}

#[test]
fn medium_sh_makes_a_pool_key() {
    let (server, mut client) = pool_of(&["one"]);
    let terminal = Terminal::of(&server);
    for command in ["./medium.sh", "./medium.sh pool"] {
        let typed = format!(
            "{}\n{}",
            as_typed("cd shell", &terminal),
            as_typed(command, &terminal)
        );
        let key = key_in(&terminal.run(&typed).ok());
        let record = record(&mut client, &key);
        assert_eq!(
            (record["use_pool"].as_str(), record["tier"].as_str()),
            ("true", "medium")
        );
        assert!(!record.contains_key("account_name"));
        assert_lasts(&record, 30);
        assert_eq!(client.acquire(&key, START).account, "one");
    }
}

#[test]
fn medium_sh_pool_60_makes_a_key_for_60_days() {
    let (server, mut client) = pool_of(&["one"]);
    let terminal = Terminal::of(&server);
    let typed = as_typed(
        "./medium.sh pool 60  # 生成60天有效期的账户池密钥",
        &terminal,
    );
    let key = key_in(&terminal.run(&format!("cd shell\n{typed}")).ok());
    let record = record(&mut client, &key);
    assert_eq!(record["use_pool"], "true");
    assert_lasts(&record, 60);
    let end: i64 = record["expires_at"].parse().unwrap();
    assert!(client.try_acquire(&key, end - 1).is_ok());
    assert!(
        client
            .try_acquire(&key, end)
            .unwrap_err()
            .starts_with("EXPIRED")
    );
}

#[test]
fn medium_sh_with_an_account_binds_the_key() {
    let (server, mut client) = pool_of(&["jasonlucy8160-outlook", "other"]);
    let terminal = Terminal::of(&server);
    for command in [
        "./medium.sh jasonlucy8160-outlook      # 绑定到特定账户",
        "./medium.sh jasonlucy8160-outlook 30   # 绑定到特定账户，30天有效期",
    ] {
        let key = key_in(
            &terminal
                .run(&format!("cd shell\n{}", as_typed(command, &terminal)))
                .ok(),
        );
        let record = record(&mut client, &key);
        assert_eq!(
            (record["use_pool"].as_str(), record["account_name"].as_str()),
            ("false", "jasonlucy8160-outlook")
        );
        assert_lasts(&record, 30);
        for day in 0..3 {
            let lease = client.acquire(&key, START + day * DAY);
            assert_eq!(
                (lease.account.as_str(), lease.state.as_str()),
                ("jasonlucy8160-outlook", "bound")
            );
        }
    }
    assert_eq!(client.slots("jasonlucy8160-outlook"), Some(0));
}

#[test]
fn an_account_file_that_is_copied_in_joins_the_pool() {
    let (server, mut client) = pool_of(&[]);
    let terminal = Terminal::of(&server);
    let incoming = terminal.folder().join("incoming");
    fs::create_dir(&incoming).unwrap();
    fs::write(incoming.join("account.json"), bearer("account")).unwrap();
    let line =
        "cp /path/to/account.json /home/leon/claude-route-ssl/claude-route-ssl/account/medium/";
    terminal
        .run(&as_typed(line, &terminal).replace("/path/to", incoming.to_str().unwrap()))
        .ok();
    wait_for("the account", || client.slots("account"));
    let key = client.pool_key();
    let lease = client.map(&["MPOOL.ACQUIRE", &key, &START.to_string(), "WITHTOKEN"]);
    assert_eq!(
        (
            text(&lease["account"]).as_str(),
            text(&lease["token"]).as_str()
        ),
        ("account", "token-of-account")
    );
}

#[test]
fn the_pools_accounts_are_the_files_that_ls_lists() {
    let (server, mut client) = pool_of(&["one", "two@example.com", "three"]);
    let terminal = Terminal::of(&server);
    let line = "ls -la /home/leon/claude-route-ssl/claude-route-ssl/account/medium/";
    let printed = terminal.run(&as_typed(line, &terminal)).ok();
    let files: BTreeSet<String> = printed
        .split_whitespace()
        .filter_map(|word| word.strip_suffix(".json"))
        .map(str::to_owned)
        .collect();
    assert_eq!(files.len(), 3);
    assert_eq!(
        occupancy(&mut client).into_keys().collect::<BTreeSet<_>>(),
        files
    );
}

#[test]
fn keys_of_a_tier_share_the_accounts_of_its_folder() {
    let server = Options::default()
        .accounts(&["one"])
        .file("high/other", &bearer("other"))
        .start();
    let mut client = server.connect();
    let keys = [client.pool_key(), client.pool_key()];
    for key in &keys {
        assert_eq!(
            client.acquire(key, START).account,
            "one",
            "all keys of the tier draw from account/medium"
        );
    }
    let third = client.pool_key();
    assert!(
        client.try_acquire(&third, START).is_err(),
        "and from no other tier's accounts"
    );
}

/// A pool and the forwarder between it and an upstream that answers each request
/// with the token that it came with, or with 401 for those that it refuses.
struct Service {
    // Dropped in this order: the forwarder goes first.
    forwarder: Forwarder,
    _upstream: Upstream,
    server: Server,
    client: Client,
}

fn service(accounts: &[&str], refused: &'static [&'static str]) -> Service {
    let (server, client) = pool_of(accounts);
    let upstream = Upstream::refusing(refused);
    Service {
        forwarder: Forwarder::between(&server, &upstream).start(),
        _upstream: upstream,
        server,
        client,
    }
}

impl Service {
    /// The token that a request got, which must be answered well.
    #[track_caller]
    fn ask(&self, key: &str) -> String {
        let answer = self.forwarder.client().get("/v1/models", key);
        assert_eq!(answer.status(), 200, "{}", answer.text());
        answer.text()
    }

    /// The account whose token a request got.
    #[track_caller]
    fn account_of(&self, key: &str) -> String {
        let token = self.ask(key);
        token.strip_prefix("token-of-").unwrap().to_owned()
    }

    /// Asks again and again while `change` goes on and until the answers come with
    /// the other token; none of them may be anything but good.
    fn ask_while(&self, key: &str, other: &str, change: impl FnOnce()) {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut client = self.forwarder.client();
                    wait_for("the move", || {
                        let answer = client.get("/v1/models", key);
                        assert_eq!(answer.status(), 200, "{}", answer.text());
                        (answer.text() == other).then_some(())
                    });
                });
            }
            change();
        });
    }
}

fn now() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    elapsed.as_millis().try_into().unwrap()
}

#[test]
fn a_request_to_a_full_pool_is_answered_503_with_the_time_of_the_next_slot() {
    let mut service = service(&["one"], &[]);
    let keys: Vec<String> = (0..3).map(|_| service.client.pool_key()).collect();
    assert_eq!(service.account_of(&keys[0]), "one");
    assert_eq!(service.account_of(&keys[1]), "one");
    let answer = service.forwarder.client().get("/v1/models", &keys[2]);
    assert_eq!((answer.status(), answer.code()), (503, Some("POOLFULL")));
    let seconds: i64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(
        (DAY / 1000 - 60..=DAY / 1000).contains(&seconds),
        "{seconds}"
    );
}

#[test]
fn the_log_has_these_lines_for_a_first_choice_a_rotation_and_a_current_account() {
    let mut service = service(&["account-name", "previous-account"], &[]);
    let key = service.client.pool_key();
    let first = service.account_of(&key);
    let rotation = format!("key_rotation:{key}");
    // Half an hour later, by moving the lease's times;
    let move_to = |client: &mut Client, last: i64| {
        let (last, next) = (last.to_string(), (last + DAY).to_string());
        client.ok(&[
            "HSET",
            &rotation,
            "last_rotation",
            &last,
            "next_rotation",
            &next,
        ]);
    };
    move_to(&mut service.client, now() - HOUR / 2);
    assert_eq!(service.account_of(&key), first);
    // a day later;
    move_to(&mut service.client, now() - DAY);
    let second = service.account_of(&key);
    assert_ne!(second, first);
    // and with less than an hour to go.
    move_to(&mut service.client, now() - DAY + HOUR / 2);
    assert_eq!(service.account_of(&key), second);

    // The guide's lines, with these accounts.
    let line = |begin: &str, account: &str| {
        let lines = LINES.iter().filter_map(|(line, _)| line.split_once("] "));
        let mut lines = lines.map(|(_, text)| text);
        let line = lines.find(|line| line.starts_with(begin)).unwrap();
        let name = if begin.starts_with("📝") {
            "previous-account"
        } else {
            "account-name"
        };
        line.replace(name, account)
    };
    let rotated = |account: &str| line("🔄 Pool", account);
    let current = |account: &str| line("📌 Pool", account);
    let token = |account: &str| line("✅ Successfully", account);
    let expected = [
        rotated(&first),
        token(&first),
        current(&first),
        token(&first),
        rotated(&second),
        line("📝 Previous", &first),
        token(&second),
        current(&second).replace("23 hours", "0 hours"),
        token(&second),
    ];
    service.forwarder.wait_for_lines("GET /v1/models 200", 4);
    let marks = ["🔄", "📝", "📌", "✅"];
    let log = service.forwarder.log();
    let log = log.iter().filter_map(|line| line.split_once("] "));
    let (times, lines): (Vec<&str>, Vec<&str>) = log
        .filter(|(_, text)| marks.iter().any(|mark| text.starts_with(mark)))
        .unzip();
    assert_eq!(lines, expected);
    let form = "[2025-08-14T14:00:00.000Z";
    let shape = |time: &str| time.replace(|c: char| c.is_ascii_digit(), "0");
    for time in times {
        assert_eq!(shape(time), shape(form));
    }
}

#[test]
fn clients_notice_nothing_of_an_account_whose_file_is_deleted() {
    let mut service = service(&["doomed"], &[]);
    let key = service.client.pool_key();
    assert_eq!(service.account_of(&key), "doomed");
    service
        .server
        .write_account("medium/other", &bearer("other"));
    wait_for("the other account", || service.client.slots("other"));
    service.ask_while(&key, "token-of-other", || {
        service.server.remove_account("medium/doomed");
    });
}

#[test]
fn clients_notice_nothing_of_a_token_that_the_upstream_refuses() {
    let mut service = service(&["refused"], &["token-of-refused"]);
    let keys = [service.client.pool_key(), service.client.pool_key()];
    for key in &keys {
        service.client.ok(&["MPOOL.ACQUIRE", key, "*"]);
    }
    service
        .server
        .write_account("medium/sound", &bearer("sound"));
    wait_for("the other account", || service.client.slots("sound"));
    for key in &keys {
        assert_eq!(service.account_of(key), "sound");
    }
    let reason = "medium_pool:cooldown_reason:refused";
    let reason: Option<String> = service.client.run(&["GET", reason]);
    assert!(reason.unwrap().contains("401"));
}

#[test]
fn clients_notice_nothing_of_a_token_that_expires() {
    let mut service = service(&["expiring"], &[]);
    let key = service.client.pool_key();
    assert_eq!(service.account_of(&key), "expiring");
    service
        .server
        .write_account("medium/sound", &bearer("sound"));
    wait_for("the other account", || service.client.slots("sound"));
    let ends = now() + 1500;
    let expiring = format!(r#"{{"access_token": "token-of-expiring", "expires_at": {ends}}}"#);
    service.ask_while(&key, "token-of-sound", || {
        service.server.write_account("medium/expiring", &expiring);
    });
}

#[test]
fn pool_status_shows_bars_totals_and_countdowns() {
    let (server, mut client) = pool_of(&["one", "two"]);
    let key = client.pool_key();
    client.ok(&["MPOOL.ACQUIRE", &key, "*"]);
    let terminal = Terminal::of(&server);
    let typed = format!(
        "{}\n{}",
        as_typed("cd shell", &terminal),
        as_typed("./pool-status.sh", &terminal)
    );
    let printed = terminal.run(&typed).ok();
    let taken = format!(
        "{}  █░  1/2",
        text(&client.map(&["MPOOL.STATUS", "KEY", &key])["account"])
    );
    for part in [
        "░░  0/2",
        &taken,
        "1 of 4 slots in use (25 %)",
        "3 free",
        "in 23 h 59 m",
    ] {
        assert!(printed.contains(part), "no {part}: {printed}");
    }
    let shown = format!("{}...{}", &key[..14], &key[key.len() - 4..]);
    assert!(
        printed.contains(&shown) && !printed.contains(&key),
        "{printed}"
    );
}

#[test]
fn the_manual_queries_show_slots_in_use() {
    let (server, mut client) = pool_of(&["account_name", "other"]);
    let terminal = Terminal::of(&server);
    let keys: Vec<String> = (0..3).map(|_| client.pool_key()).collect();
    for key in &keys {
        client.acquire(key, START);
    }
    let used = occupancy(&mut client);
    let one = as_typed(
        r#"redis-cli -p 6380 get "medium_pool:slots:account_name""#,
        &terminal,
    );
    assert_eq!(
        terminal.run(&one).ok().trim(),
        used["account_name"].to_string()
    );
    let all = as_typed(
        r#"redis-cli -p 6380 keys "medium_pool:slots:*" | xargs -I {} sh -c 'echo -n "{}: "; redis-cli -p 6380 get "{}"'"#,
        &terminal,
    );
    let printed = terminal.run(&all).ok();
    let shown: BTreeSet<&str> = printed.lines().collect();
    let expected: Vec<String> = used
        .iter()
        .map(|(name, used)| format!("medium_pool:slots:{name}: {used}"))
        .collect();
    assert_eq!(shown, expected.iter().map(String::as_str).collect());
}

#[test]
fn the_manual_query_of_a_key_shows_its_rotation() {
    let (server, mut client) = pool_of(&["one", "two"]);
    let terminal = Terminal::of(&server);
    client.ok(&[
        "HSET",
        "client_keys:sk-cli-v1-xxxxx",
        "tier",
        "medium",
        "use_pool",
        "true",
        "active",
        "true",
    ]);
    let first = client.acquire("sk-cli-v1-xxxxx", START);
    let second = client.acquire("sk-cli-v1-xxxxx", START + DAY);
    let typed = as_typed(
        r#"redis-cli -p 6380 hgetall "key_rotation:sk-cli-v1-xxxxx""#,
        &terminal,
    );
    let printed = terminal.run(&typed).ok();
    let lines: Vec<&str> = printed.lines().collect();
    let fields: BTreeMap<&str, &str> = lines.chunks(2).map(|pair| (pair[0], pair[1])).collect();
    let (last, next) = ((START + DAY).to_string(), (START + 2 * DAY).to_string());
    let expected = [
        ("account", second.account.as_str()),
        ("last_rotation", &last),
        ("next_rotation", &next),
        ("previous_account", &first.account),
    ];
    assert_eq!(fields, BTreeMap::from(expected));
}

#[test]
fn only_medium_has_a_pool() {
    let server = Options::default()
        .accounts(&["one"])
        .file("high/high-one", &bearer("high-one"))
        .file("supreme/supreme-one", &bearer("supreme-one"))
        .start();
    let mut client = server.connect();
    let terminal = Terminal::of(&server);
    for (tier, account) in [("high", "high-one"), ("supreme", "supreme-one")] {
        let error = client.error(&["MPOOL.KEYGEN", tier, "POOL"]);
        assert!(error.contains("request limits"), "{error}");
        let said = terminal
            .run(&format!("cd shell; ./{tier}.sh pool"))
            .fails(2);
        assert!(said.contains("request limits"), "{said}");
        let key = key_in(
            &terminal
                .run(&format!("cd shell; ./{tier}.sh {account}"))
                .ok(),
        );
        let lease = client.acquire(&key, START);
        assert_eq!(
            (lease.account.as_str(), lease.state.as_str()),
            (account, "bound")
        );
    }
}

#[test]
fn a_pool_without_a_valid_account_lends_nothing() {
    let server = Options::default()
        .file("medium/broken", "{")
        .file("high/high-one", &bearer("high-one"))
        .start();
    let mut client = server.connect();
    let key = client.pool_key();
    assert!(
        client
            .try_acquire(&key, START)
            .unwrap_err()
            .starts_with("NOACCOUNT")
    );
    server.write_account("medium/valid", &bearer("valid"));
    wait_for("the valid account", || client.slots("valid"));
    assert_eq!(client.acquire(&key, START).account, "valid");
}

#[test]
fn one_key_shared_by_a_team_moves_through_several_accounts() {
    let (server, mut client) = pool_of(&["one", "two", "three"]);
    let key = client.pool_key();
    let mut team: Vec<Client> = (0..5).map(|_| server.connect()).collect();
    let mut accounts = Vec::new();
    for day in 0..7 {
        let today: BTreeSet<String> = (0_i64..)
            .zip(&mut team)
            .map(|(hour, member)| {
                member
                    .acquire(&key, START + day * DAY + hour * HOUR)
                    .account
            })
            .collect();
        assert_eq!(today.len(), 1, "the whole team is on one account");
        assert_eq!(
            occupancy(&mut client).values().sum::<u64>(),
            1,
            "and takes one slot"
        );
        accounts.extend(today);
    }
    assert!(
        accounts.windows(2).all(|days| days[0] != days[1]),
        "{accounts:?}"
    );
}

#[test]
fn the_keys_of_a_service_are_spread_over_the_accounts() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let (_server, mut client) = pool_of(&names);
    let keys: Vec<String> = (0..names.len()).map(|_| client.pool_key()).collect();
    for day in 0..3 {
        let used: BTreeSet<String> = keys
            .iter()
            .map(|key| client.acquire(key, START + day * DAY).account)
            .collect();
        assert_eq!(used.len(), names.len(), "{used:?}");
    }
}
