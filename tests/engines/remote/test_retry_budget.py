"""The retry budget."""

from __future__ import annotations

from taskvec.engines.remote.engine import MAX_RETRY_BALANCE, RETRY_RATIO, RetryBudget


def withdrawals(budget: RetryBudget, limit: int = 10_000) -> int:
    """Return the number of retries until the budget is empty."""
    return next(i for i in range(limit) if not budget.withdraw())


def test_it_starts_full() -> None:
    """A full budget covers all calls in progress to a server that dies."""
    assert withdrawals(RetryBudget()) == MAX_RETRY_BALANCE


def test_five_calls_deposit_one_retry() -> None:
    """When the balance is used up, at most a fifth of the calls are retried."""
    budget = RetryBudget()
    withdrawals(budget)
    for _ in range(4):
        budget.deposit()
    assert not budget.withdraw()
    budget.deposit()
    assert budget.withdraw()
    assert not budget.withdraw()
    for _ in range(1000):
        budget.deposit()
    assert abs(withdrawals(budget) - 1000 * RETRY_RATIO) <= 1


def test_the_balance_is_limited() -> None:
    """Many successful calls do not raise the balance above the maximum."""
    budget = RetryBudget()
    for _ in range(100_000):
        budget.deposit()
    assert withdrawals(budget) == MAX_RETRY_BALANCE


def test_a_failed_withdrawal_is_free() -> None:
    """Failed withdrawals do not delay the next retry."""
    budget = RetryBudget()
    withdrawals(budget)
    for _ in range(100):
        assert not budget.withdraw()
    for _ in range(6):
        budget.deposit()
    assert budget.withdraw()
