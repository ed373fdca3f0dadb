"""How every Ray that is started here is set up."""

# Ray reads these when it is imported and when it starts its processes; there are no arguments for them.
RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: every process listens on 127.0.0.1 alone
    "RAY_memory_monitor_refresh_ms": "0",  # the kernel, not Ray, says when memory is out
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # the controller tells of deaths; Ray's paragraphs on them are skipped
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none
    # A lost node is declared dead after about 6 s instead of 25.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
OBJECT_STORE_BYTES = 80 * 2**20  # about Ray's least: only functions and results go through it
