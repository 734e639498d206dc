# Heads: bytes of a flow that lie on the heap, in no worker's buffers.


# -> a copy of bytes with `spare` bytes of room behind them, NULL without memory. Owned by the
# flow; freed by head_give(). Runs on: control plane, for bytes that were read before
# admission; a worker whose pool is dry, for a TLS record that dst did not take.
cdef char* head_take(const char* data, size_t size, size_t spare) noexcept nogil:
    cdef char* head = <char*>malloc(size + spare)
    if head != NULL:
        memcpy(head, data, size)
    return head


cdef void head_give(char* head) noexcept nogil:
    free(head)
