# Rings: one producer, one consumer, power-of-two size, never full by construction.
#
# Outbox (worker -> control): a slot sits in it at most once with its end, because it is freed
# only when that was polled, and at most once as a newcomer, because that is said again only when
# the last time has been answered; so OUTBOX_PER_FLOW x capacity cells are enough.
# Inbox (control -> worker): per slot at most a stale ABORT and a stale TOUCH of its last life, one
# ADMIT, one ABORT and one TOUCH (its wishes are bits, and only the first rings) are on the way
# at once, because the ring is first in first out; so INBOX_PER_FLOW x capacity cells are enough.

cdef enum:
    INBOX_PER_FLOW = 8          # 5 by the argument above, rounded up to a power of two
    OUTBOX_PER_FLOW = 2


# -> 1 put, 0 full (a broken promise: callers hand the result to NP_BUG).
# Runs on: the producer only.
cdef inline int ring_put(Ring* ring, uint64_t value) noexcept nogil:
    cdef uint64_t tail = load_relaxed64(&ring.tail)
    if tail - load_acquire64(&ring.head) > ring.mask:
        return 0
    ring.cells[tail & ring.mask] = value
    publish_release64(&ring.tail, tail + 1)
    return 1


# -> 1 and *value, 0 if empty. Runs on: the consumer only.
cdef inline int ring_get(Ring* ring, uint64_t* value) noexcept nogil:
    cdef uint64_t head = load_relaxed64(&ring.head)
    if head == load_acquire64(&ring.tail):
        return 0
    value[0] = ring.cells[head & ring.mask]
    publish_release64(&ring.head, head + 1)
    return 1


# Ring an eventfd unless it is rung already. The flag is exchanged *after* the item was put
# and cleared *before* the reader scans: both are read-modify-writes of one word, so either
# the reader sees the item or the writer sees a cleared flag and rings.
cdef inline int ring_bell(uint32_t* rung, int fd) noexcept nogil:
    if exchange32(rung, 1):
        return 0
    return sys_ring(fd)
