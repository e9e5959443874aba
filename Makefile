# The commands of this repository. `make` alone lists them.
# CARGO_TARGET_DIR is respected, as every build goes through cargo.

.DEFAULT_GOAL := help
# The targets of `test` build on one another, in this order, under -j too.
.NOTPARALLEL:
.PHONY: help run stop test lint unit integration test-servers sanitize torture bench build optimized clean deps-test deps-optimize deps-bench

# The folder that make was called from, even with -C: what `make run` prints
# is to work there.
export MPOOL_CALLED_FROM := $(PWD)

# Every script, by name or by kind.
SCRIPTS = $(wildcard shell/*.sh scripts/* .ci/run examples/*.sh)

OPTIMIZED = $(abspath $(or $(CARGO_TARGET_DIR),target))/optimized/mpool-forwarder

help: ## lists these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

run: ## starts Redis (PORT=6380) and a forwarder (FORWARDER_PORT=8080) in front of UPSTREAM=… or a demo
	@scripts/run

stop: ## stops what `make run` started
	@scripts/stop

test: deps-test lint build ## everything: formatting, lints, scripts, unit, property and integration tests
	cargo test

lint: ## rustfmt, clippy, shellcheck, and that the fuzz targets can be built
	cargo fmt --check
	cargo clippy --all-targets --features ceiling -- -D warnings
	RUSTFLAGS='-D warnings --cfg fuzzing' cargo check --locked --manifest-path fuzz/Cargo.toml --no-default-features --target-dir target/fuzz-check
	shellcheck -x $(SCRIPTS)

unit: ## the tests that need no Redis
	cargo test --lib --bins

integration: build ## the tests that start their own servers
	cargo test --test '*'

test-servers: deps-test ## the integration tests with Redis 7.0, 8.0, 8.2 and Valkey 8.1 (SERVERS=… for some of them)
	@scripts/test-servers $(SERVERS)

sanitize: deps-test ## the integration tests and 100,000 commands with AddressSanitizer in the module
	@scripts/sanitize

torture: deps-test build ## an hour of crashes, failovers, random commands and fuzzing
	MPOOL_CRASH_ROUNDS=300 cargo test --test crash -- --nocapture
	MPOOL_FAILOVER_ROUNDS=40 cargo test --test failover -- --nocapture
	cargo build --release --lib
	MPOOL_RANDOM_CALLS=2000000 cargo test --release --test flood -- --nocapture
	CARGO_PROFILE_TEST_OPT_LEVEL=2 cargo test --lib states:: -- --ignored
	scripts/fuzz 60

bench: deps-bench optimized ## the benchmarks: a page of ratios, kept in benches/RESULTS.md
	cargo build --release --features ceiling --lib --bins --example turns
	MPOOL_BENCH_RESULTS=benches/RESULTS.md MPOOL_BENCH_FORWARDER=optimized=$(OPTIMIZED) cargo bench --quiet --features ceiling --bench module --bench growth --bench stalls --bench forwarder

build: ## the module, the forwarder and the demo upstream, for the tests
	cargo build --lib --bins --examples

optimized: deps-optimize ## target/optimized/mpool-forwarder, built by a profile of itself under load: an eighth less CPU time
	@scripts/optimize

clean: ## removes what was built; data/ and account/ stay
	cargo clean

deps-test:
	@scripts/install-deps test

deps-optimize:
	@scripts/install-deps optimize

deps-bench:
	@scripts/install-deps bench
