# Queues of bytes: datagrams that wait for a link, for room, or for their second half. A chain of
# cells; an empty queue costs nothing. Runs on: the worker.


cdef inline void queue_clear(Queue* queue) noexcept nogil:
    queue.first = NONE_SLOT
    queue.last = NONE_SLOT
    queue.start = 0
    queue.stop = 0
    queue.bytes = 0


# -> 1 all of it is at the end of the queue, 0 no cells: nothing is.
cdef int queue_put(Worker* w, Queue* queue, const char* data, size_t size) noexcept nogil:
    cdef size_t room = 0 if queue.first == NONE_SLOT else CELL_BYTES - queue.stop
    cdef size_t part
    cdef uint32_t cell
    if size > room and (size - room + CELL_BYTES - 1) // CELL_BYTES > cell_left(w):
        return 0
    add_own64(&w.counters.datagram_bytes_held, size)
    queue.bytes += size
    while size:
        if room == 0:
            cell = cell_take(w)
            w.cell_next[cell] = NONE_SLOT
            if queue.first == NONE_SLOT:
                queue.first = cell
                queue.start = 0
            else:
                w.cell_next[queue.last] = cell
            queue.last = cell
            queue.stop = 0
            room = CELL_BYTES
        part = min(size, room)
        memcpy(cell_at(w, queue.last) + queue.stop, data, part)
        queue.stop += <uint32_t>part
        room -= part
        data += part
        size -= part
    return 1


# -> 1 the datagram is at the end of the queue as a frame, 0 nothing is: no cells but `kept` ones.
cdef int queue_put_frame(
    Worker* w, Queue* queue, const char* data, size_t size, size_t kept
) noexcept nogil:
    cdef uint8_t head[FRAME_HEAD]
    # Enough wherever the tail stands.
    if (FRAME_HEAD + size) // CELL_BYTES + 2 + kept > cell_left(w):
        return 0
    head[0] = <uint8_t>(size >> 8)
    head[1] = <uint8_t>(size & 0xFF)
    return queue_put(w, queue, <const char*>head, FRAME_HEAD) and queue_put(w, queue, data, size)


# Take the first `size` bytes, which must be there, off the queue. `into` may be NULL: they are
# thrown away.
cdef void queue_take(Worker* w, Queue* queue, char* into, size_t size) noexcept nogil:
    cdef size_t part
    cdef uint32_t cell
    take_own64(&w.counters.datagram_bytes_held, size)
    queue.bytes -= size
    while size:
        cell = queue.first
        part = (queue.stop if cell == queue.last else <size_t>CELL_BYTES) - queue.start
        if part > size:
            part = size
        if into != NULL:
            memcpy(into, cell_at(w, cell) + queue.start, part)
            into += part
        queue.start += <uint32_t>part
        size -= part
        if queue.bytes == 0 and size == 0:
            cell_give(w, cell)
            queue_clear(queue)
        elif queue.start == CELL_BYTES:
            queue.first = w.cell_next[cell]
            queue.start = 0
            cell_give(w, cell)


cdef inline void queue_drop(Worker* w, Queue* queue) noexcept nogil:
    queue_take(w, queue, NULL, queue.bytes)


# -> bytes of the first frame with its length, 0 if not even the length is there.
cdef inline size_t queue_frame(Worker* w, Queue* queue) noexcept nogil:
    cdef uint32_t cell = queue.first
    cdef uint32_t at = queue.start
    cdef size_t high
    if queue.bytes < FRAME_HEAD:
        return 0
    high = <uint8_t>cell_at(w, cell)[at]
    at += 1
    if at == CELL_BYTES:
        cell = w.cell_next[cell]
        at = 0
    return FRAME_HEAD + (high << 8) + <uint8_t>cell_at(w, cell)[at]


# -> whole frames in a queue, which is emptied; the beginning of another one does not count.
cdef uint64_t queue_drop_frames(Worker* w, Queue* queue) noexcept nogil:
    cdef uint64_t count = 0
    cdef size_t size = queue_frame(w, queue)
    while 0 < size <= queue.bytes:
        queue_take(w, queue, NULL, size)
        count += 1
        size = queue_frame(w, queue)
    queue_drop(w, queue)
    return count
