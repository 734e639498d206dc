# Cells of 4 KiB, of which queues are chains: a peer with one small datagram costs one of them.
#
# All cells of a worker lie in one mapping; with none left whoever wanted to wait loses a datagram,
# which is counted. Strangers may fill half of them, links that take nothing three quarters; the
# last quarter is for half frames, without which a link could not go on. Runs on: the worker.

cdef enum:
    CELL_BYTES = 4096           # the smallest page there is; see Core.can_forget_cells
    MAX_CELLS = 16384           # per worker: 64 MiB, the bound of what waits
    PARK_KEEPS = 8192           # cells that parked datagrams leave to others, ...
    QUEUE_KEEPS = 4096          # ... and those that wait for a link
    WARM_CELLS = 256            # free cells that may stay resident (1 MiB)


cdef inline char* cell_at(Worker* w, uint32_t cell) noexcept nogil:
    return w.cells + <size_t>cell * CELL_BYTES


# -> cells that can still be taken.
cdef inline size_t cell_left(Worker* w) noexcept nogil:
    return w.cells_free + (MAX_CELLS - w.cells_fresh)


# The caller made sure that one is left.
cdef inline uint32_t cell_take(Worker* w) noexcept nogil:
    if w.cells_free:
        w.cells_free -= 1
        return w.cell_stack[w.cells_free]
    w.cells_fresh += 1
    return w.cells_fresh - 1


cdef inline void cell_give(Worker* w, uint32_t cell) noexcept nogil:
    NP_BUG(w.cells_free >= MAX_CELLS, &w.counters.bugs, b"cell given twice")
    if w.cells_free >= WARM_CELLS and w.core.can_forget_cells:
        sys_forget(cell_at(w, cell), CELL_BYTES)
    elif NP_DEBUG:
        memset(cell_at(w, cell), 0xDD, CELL_BYTES)
    w.cell_stack[w.cells_free] = cell
    w.cells_free += 1
