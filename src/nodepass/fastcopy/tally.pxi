# Counts of datagrams, of a relay and of its worker. Runs on: the worker.


cdef inline void tally_drop(Worker* w, Udp* udp, int index, uint64_t count) noexcept nogil:
    if count:
        add_own64(&udp.tally[index], count)
        add_own64(&w.counters.datagrams_dropped, count)


# Count datagrams that are on their way: into way `index`.
cdef inline void tally_carried(
    Worker* w, Udp* udp, int index, uint64_t count, uint64_t size
) noexcept nogil:
    add_own64(&udp.tally[T_DATAGRAMS_UP + index], count)
    add_own64(&udp.tally[T_BYTES_UP + index], size)
    if index == 0:
        add_own64(&w.counters.datagrams_up, count)
    else:
        add_own64(&w.counters.datagrams_down, count)


cdef inline void tally_overrun(Worker* w, Udp* udp, uint32_t lost) noexcept nogil:
    tally_drop(w, udp, T_OVERRUN, <uint32_t>(lost - udp.socket_lost))
    udp.socket_lost = lost
