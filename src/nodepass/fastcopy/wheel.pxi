# The timer wheel of a worker: idle limits, and dials that may take so long.

cdef enum:
    TICK_MS = 100               # one bucket of the wheel


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
cdef void wheel_run(Worker* w) noexcept nogil:
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
                if flow_is_udp(flow):
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
