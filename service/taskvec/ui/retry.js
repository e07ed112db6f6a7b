// Work of a view that failed because the service was not reached, or was not ready: done again.

export const RETRY_MILLISECONDS = 3000;

const NOT_REACHED = [0, 502, 503, 504]; // 0: no answer; 502 and 504 are those of proxies

/**
 * Repeat a view's work after such an error, every few seconds while the view is in sight, and at
 * once when it comes into sight again.
 * Returns a function that takes how the work went: its error, or nothing.
 */
export function repeated(view, work) {
  let timer = null;
  let due = false;
  const again = () => {
    clearTimeout(timer);
    if (!due || view.hidden || document.visibilityState !== "visible") return;
    due = false;
    work({ again: true });
  };
  addEventListener("hashchange", again); // after the page's own listener, which shows the view
  document.addEventListener("visibilitychange", again);
  return (error) => {
    clearTimeout(timer);
    due = error !== undefined && NOT_REACHED.includes(error.status);
    if (due) timer = setTimeout(again, RETRY_MILLISECONDS);
  };
}
