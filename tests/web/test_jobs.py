"""Laws of the queue: one job at a time, in order, each with its own end."""

import logging
import threading

import torch

from ldm.web.jobs import CANCELLED, DONE, FAILED, Job, Queue

PATIENCE = 30  # seconds


def wait(queue: Queue) -> None:
    """Until the jobs that are in the queue have ended."""
    ended = threading.Event()
    queue.add(Job(lambda job: ended.set()))
    assert ended.wait(PATIENCE)


def test_jobs_run_in_order_and_one_that_waits_can_be_taken_out():
    queue, started, go, order = Queue(), threading.Event(), threading.Event(), []

    def slow(job):
        started.set()
        assert go.wait(PATIENCE)
        order.append("slow")

    first, second, third = Job(slow), Job(lambda job: order.append("second")), Job(lambda job: order.append("third"))
    for job in (first, second, third):
        queue.add(job)
    assert started.wait(PATIENCE) and (queue.ahead(first), queue.ahead(second), queue.ahead(third)) == (0, 1, 2)
    queue.cancel(second)
    assert second.state == CANCELLED and queue.ahead(third) == 1
    go.set()
    wait(queue)
    assert [first.state, third.state] == [DONE, DONE] and order == ["slow", "third"]


def test_a_cancelled_job_ends_at_its_next_report_and_the_queue_goes_on():
    queue, reached = Queue(), threading.Event()

    def endless(job):
        while True:
            job.step += 1
            reached.set()
            job.report()

    job = Job(endless)
    queue.add(job)
    assert reached.wait(PATIENCE)
    queue.cancel(job)
    wait(queue)
    assert job.state == CANCELLED and job.step > 0


def test_a_queue_that_is_closed_has_ended_its_jobs_and_an_ended_job_holds_no_uploads():
    queue, reached = Queue(), threading.Event()

    def endless(job):
        while True:
            reached.set()
            job.report()

    jobs = [Job(endless), Job(endless)]
    for job in jobs:
        queue.add(job)
    assert reached.wait(PATIENCE)
    queue.close(PATIENCE)
    assert [(job.state, job.work) for job in jobs] == [(CANCELLED, None)] * 2


def test_an_error_of_the_user_is_one_line_and_another_one_names_the_log(caplog):
    def fail(error):
        def work(job):
            raise error

        return work

    jobs = [Job(fail(error)) for error in (ValueError("--H 7:\n choose 8"), KeyError("k"), torch.OutOfMemoryError("x"))]
    for job in jobs:
        job.run()
    assert [job.state for job in jobs] == [FAILED] * 3
    assert jobs[0].error == "--H 7: choose 8" and "KeyError" in jobs[1].error and "the log" in jobs[1].error
    assert "smaller images" in jobs[2].error and "a job failed" in caplog.text


def test_a_job_collects_the_warnings_of_its_own_thread():
    def work(job):
        thread = threading.Thread(target=logging.getLogger("ldm.x").warning, args=("of another",))
        thread.start()
        thread.join()
        logging.getLogger("ldm.x").warning("--scale has no %s", "effect")
        logging.getLogger("ldm.x").info("loaded")

    job = Job(work)
    job.run()
    assert job.notes == ["--scale has no effect"]
