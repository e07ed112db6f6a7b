"""How many failed calls may be sent again."""

from __future__ import annotations

from taskvec.engines.remote.engine import MAX_RETRY_BALANCE, RETRY_RATIO, RetryBudget


def spent(budget: RetryBudget, most: int = 10_000) -> int:
    """How many retries it grants before it refuses one."""
    return next(i for i in range(most) if not budget.withdraw())


def test_it_starts_full() -> None:
    """A server that dies with everything in flight to it costs no request."""
    assert spent(RetryBudget()) == MAX_RETRY_BALANCE


def test_five_calls_earn_a_retry() -> None:
    """Once the reserve is gone, retries are a fifth of the calls at most."""
    budget = RetryBudget()
    spent(budget)
    for _ in range(4):
        budget.deposit()
    assert not budget.withdraw()
    budget.deposit()
    assert budget.withdraw()
    assert not budget.withdraw()
    for _ in range(1000):
        budget.deposit()
    assert abs(spent(budget) - 1000 * RETRY_RATIO) <= 1


def test_quiet_days_save_up_no_storm() -> None:
    """However many calls went well, there is never more than the reserve."""
    budget = RetryBudget()
    for _ in range(100_000):
        budget.deposit()
    assert spent(budget) == MAX_RETRY_BALANCE


def test_a_refusal_costs_nothing() -> None:
    """Asking in vain again and again does not push the next retry further away."""
    budget = RetryBudget()
    spent(budget)
    for _ in range(100):
        assert not budget.withdraw()
    for _ in range(6):
        budget.deposit()
    assert budget.withdraw()
