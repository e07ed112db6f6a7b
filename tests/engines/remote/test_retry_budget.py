"""How many failed calls may be sent again."""

from __future__ import annotations

from taskvec.engines.remote.engine import RESERVE, SHARE, RetryBudget


def spent(budget: RetryBudget, most: int = 10_000) -> int:
    """How many retries it grants before it refuses one."""
    return next(i for i in range(most) if not budget.spend())


def test_it_starts_full() -> None:
    """A server that dies with everything in flight to it costs no request."""
    assert spent(RetryBudget()) == RESERVE


def test_five_calls_earn_a_retry() -> None:
    """Once the reserve is gone, retries are a fifth of the calls at most."""
    budget = RetryBudget()
    spent(budget)
    for _ in range(4):
        budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()
    assert not budget.spend()
    for _ in range(1000):
        budget.earn()
    assert abs(spent(budget) - 1000 * SHARE) <= 1


def test_quiet_days_save_up_no_storm() -> None:
    """However many calls went well, there is never more than the reserve."""
    budget = RetryBudget()
    for _ in range(100_000):
        budget.earn()
    assert spent(budget) == RESERVE


def test_a_refusal_costs_nothing() -> None:
    """Asking in vain again and again does not push the next retry further away."""
    budget = RetryBudget()
    spent(budget)
    for _ in range(100):
        assert not budget.spend()
    for _ in range(6):
        budget.earn()
    assert budget.spend()
