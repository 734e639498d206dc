# The worker thread: one epoll set, one inbox, a ready list with budgets, a timer wheel.
#
#   epoll_wait -> events set bits and queue flows -> inbox orders -> one turn per ready flow
#        ^                                                              |
#        +---- completions published <- idle wheel <--------------------+
#
# A flow found dead during a round goes to the grave list and is published only at the end
# of the round: nobody can hold a stale pointer to a slot that Python has recycled.
# Nothing here may touch Python, allocate, or block outside epoll_wait.

cdef enum:
    TICK_MS = 100               # one bucket of the wheel
    WAKE_TAG = 0                # event data of the wake eventfd; flows have a generation > 0


# -> 0 or -errno. Open the fds of a worker and start its thread; on failure whatever was
# opened is closed again. Runs on: control plane.
cdef int worker_start(Worker* w) noexcept nogil:
    cdef sigset_t blocked
    cdef sigset_t before
    cdef int rc = 0
    w.core.references += 1      # before the thread that will drop it exists
    w.wake = sys_eventfd()
    w.epoll = sys_epoll_open()
    if w.wake < 0 or w.epoll < 0:
        rc = w.wake if w.wake < 0 else w.epoll
    if rc == 0:
        rc = sys_epoll_add(w.epoll, w.wake, WAKE_TAG)
    if rc == 0:
        # Signals belong to Python's threads. The new thread inherits the mask of its maker;
        # faults stay open, or a crash would be a hang. SIGPIPE is among the blocked: splice
        # raises it.
        sigfillset(&blocked)
        sigdelset(&blocked, SIGSEGV)
        sigdelset(&blocked, SIGBUS)
        sigdelset(&blocked, SIGFPE)
        sigdelset(&blocked, SIGILL)
        pthread_sigmask(SIG_SETMASK, &blocked, &before)
        rc = -pthread_create(&w.thread, NULL, worker_main, w)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
    if rc == 0:
        w.is_started = 1
        pthread_setname_np(w.thread, b"nodepass-engine")
        return 0
    w.core.references -= 1
    if w.wake >= 0:
        sys_close(w.wake)
    if w.epoll >= 0:
        sys_close(w.epoll)
    w.wake = -1
    w.epoll = -1
    return rc


cdef void* worker_main(void* argument) noexcept nogil:
    cdef Worker* w = <Worker*>argument
    cdef Core* core = w.core
    cdef int n
    cdef int i
    w.now_ms = sys_now_ms()
    w.tick = w.now_ms // TICK_MS
    while True:
        n = sys_epoll_wait(w.epoll, w.events, MAX_EVENTS, worker_timeout(w))
        w.now_ms = sys_now_ms()
        add_own64(&w.counters.wakeups, 1)
        NP_BUG(n < 0, &w.counters.bugs, b"epoll_wait failed")
        for i in range(n):
            worker_event(w, &w.events[i])
        worker_run_ready(w)
        worker_run_wheel(w)
        worker_run_looks(w)
        worker_publish(w)
        if load_acquire32(&w.stop):
            break
    worker_leave(w)
    sys_ring(core.done)
    core_release(core)
    return NULL


# -> milliseconds that epoll_wait may sleep; -1: until something happens.
cdef inline int worker_timeout(Worker* w) noexcept nogil:
    cdef uint64_t due
    if w.ready.count or w.looks_left:
        return 0
    if w.wheel_count == 0 and w.look_ms == 0:
        return -1
    due = w.wheel_next * TICK_MS if w.wheel_count else w.look_ms
    if 0 < w.look_ms < due:
        due = w.look_ms
    return <int>(due - w.now_ms) + 1 if due > w.now_ms else 0


# One event: note the kernel's word and queue the flow.
cdef void worker_event(Worker* w, epoll_event* event) noexcept nogil:
    cdef uint64_t tag = event.data.u64
    cdef uint32_t what = event.events
    cdef uint32_t slot = (<uint32_t>tag) >> 1
    cdef int side = <int>(tag & 1)
    cdef Flow* flow
    cdef Leg* leg
    if tag == WAKE_TAG:
        worker_run_inbox(w)
        return
    flow = &w.core.flows[slot]
    if load_relaxed32(&flow.generation) != <uint32_t>(tag >> 32) or (
        load_relaxed32(&flow.state) != FLOW_OPEN
    ):
        add_own64(&w.counters.stale_events, 1)
        return
    leg = &flow.legs[side]
    if what & EPOLLERR:
        leg.bits |= SEEN_ERROR
    if what & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        leg.bits |= MAY_READ
    if what & (EPOLLOUT | EPOLLHUP | EPOLLERR):
        leg.bits |= MAY_WRITE
    if what & (EPOLLRDHUP | EPOLLHUP):
        leg.bits |= SEEN_RDHUP
    if what & EPOLLPRI:
        leg.bits |= SEEN_URGENT
    flow_want_turn(w, flow, slot)


# Orders of the control plane. The flag is cleared before the scan (see ring_bell); the
# eventfd is edge-triggered and need not be read.
#
# An ABORT may come when its flow has been polled and its slot given away, even to another
# worker. So the state is read first: if that other one has made it OPEN, then its generation
# has risen, and the release of the one shows the other.
cdef void worker_run_inbox(Worker* w) noexcept nogil:
    cdef uint64_t order = 0
    cdef uint32_t slot
    cdef uint32_t kind
    cdef uint32_t state
    cdef Flow* flow
    exchange32(&w.wake_rung, 0)
    while ring_get(&w.inbox, &order):
        slot = (<uint32_t>order) >> ORDER_BITS
        kind = <uint32_t>order & ((1 << ORDER_BITS) - 1)
        flow = &w.core.flows[slot]
        state = load_acquire32(&flow.state)
        if load_relaxed32(&flow.generation) != <uint32_t>(order >> 32):
            add_own64(&w.counters.stale_events, 1)
        elif kind == ORDER_ADMIT:
            flow_admit(w, flow, slot)
        elif state != FLOW_OPEN:
            continue
        elif kind == ORDER_ABORT:
            flow_bury(w, flow, slot, R_ABORTED, 0, 0)
        elif kind == ORDER_TOUCH:
            udp_touch(w, flow, slot)
        else:
            flow_doubt(w, flow, slot)


# One turn for every flow that was ready when the round began; who has budget left over
# work stands at the tail again and meets fresh events first. The worker that has the
# handshakes stops after a few: a crowd of them must not keep an abort waiting.
cdef void worker_run_ready(Worker* w) noexcept nogil:
    cdef uint32_t left = min(w.ready.count, w.round_turns)
    cdef uint32_t slot
    cdef Flow* flow
    if left:
        worker_want_look(w)
    while left and w.ready.count:
        left -= 1
        slot = w.ready.first
        flow = &w.core.flows[slot]
        list_remove(w.core.flows, &w.ready, LINK_READY, slot)
        flow.is_ready = 0
        flow.is_calm = 0
        add_own64(&w.counters.turns, 1)
        if flow_turn(w, flow, slot):
            flow_want_turn(w, flow, slot)


cdef inline void flow_want_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    if not flow.is_ready:
        flow.is_ready = 1
        list_append(w.core.flows, &w.ready, LINK_READY, slot)


# Put a flow with an idle limit into the bucket of its deadline. Bytes do not move it: the
# bucket is looked at when due, and a flow that was active goes round again.
cdef void wheel_put(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef uint64_t tick = (flow.active_ms + flow.idle_ms) // TICK_MS + 1
    if tick <= w.tick:
        tick = w.tick + 1
    if tick >= w.tick + WHEEL_BUCKETS:
        tick = w.tick + WHEEL_BUCKETS - 1
    if w.wheel_count == 0 or tick < w.wheel_next:
        w.wheel_next = tick
    flow.bucket = <uint32_t>(tick & (WHEEL_BUCKETS - 1))
    list_append(w.core.flows, &w.wheel[flow.bucket], LINK_WHEEL, slot)
    w.wheel_count += 1


cdef void wheel_drop(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    list_remove(w.core.flows, &w.wheel[flow.bucket], LINK_WHEEL, slot)
    w.wheel_count -= 1


# Turn the wheel up to now: end who was idle too long, or has dialled in vain.
cdef void worker_run_wheel(Worker* w) noexcept nogil:
    cdef uint64_t now = w.now_ms // TICK_MS
    cdef List* chain
    cdef Flow* flow
    cdef uint32_t left
    cdef uint32_t slot
    if w.wheel_count == 0 or now < w.wheel_next:
        w.tick = now
        return
    w.tick = w.wheel_next - 1
    while w.tick < now and w.wheel_count:
        w.tick += 1
        chain = &w.wheel[w.tick & (WHEEL_BUCKETS - 1)]
        left = chain.count
        while left and chain.count:
            left -= 1
            slot = chain.first
            flow = &w.core.flows[slot]
            if w.now_ms - flow.active_ms >= flow.idle_ms:
                if flow.kind >= KIND_GATE:
                    udp_expire(w, flow, slot)
                elif flow.is_dialling:
                    flow_bury(w, flow, slot, R_UNMET, 2, ETIMEDOUT)
                else:
                    flow_bury(w, flow, slot, R_IDLE, 0, 0)
            else:
                wheel_drop(w, flow, slot)
                wheel_put(w, flow, slot)
    w.tick = now
    if w.wheel_count:
        w.wheel_next = w.tick + 1
        while w.wheel[w.wheel_next & (WHEEL_BUCKETS - 1)].count == 0:
            w.wheel_next += 1


# Hand the dead of this round to the control plane; one bell for all of them, and for newcomers.
cdef void worker_publish(Worker* w) noexcept nogil:
    cdef uint32_t slot
    cdef Flow* flow
    if w.grave.count == 0 and not w.must_ring:
        return
    w.must_ring = 0
    while w.grave.count:
        slot = w.grave.first
        flow = &w.core.flows[slot]
        list_remove(w.core.flows, &w.grave, LINK_READY, slot)
        flow_move(w, flow, FLOW_DONE)
        NP_BUG(not ring_put(&w.outbox, slot), &w.counters.bugs, b"outbox full")
    NP_BUG(ring_bell(&w.core.notify_rung, w.core.notify) < 0, &w.counters.bugs,
           b"completion bell failed")


# The last round: take what is still in the inbox, end every flow, close what is ours.
cdef void worker_leave(Worker* w) noexcept nogil:
    worker_run_inbox(w)
    while w.all.count:
        flow_bury(w, &w.core.flows[w.all.first], w.all.first, R_ABORTED, 0, 0)
    worker_publish(w)
    pipes_close(w)
    NP_BUG(sys_close(w.epoll) < 0, &w.counters.bugs, b"closing the epoll set failed")
    w.epoll = -1
    publish_release32(&w.exited, 1)
