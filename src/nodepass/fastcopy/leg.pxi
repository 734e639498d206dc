# The end of a leg: how a worker lets go of a socket. Runs on: the worker.


cdef void leg_close(Worker* w, Leg* leg, bint reset) noexcept nogil:
    cdef int fd = leg.fd
    cdef int rc = sys_epoll_delete(w.epoll, fd)
    NP_BUG(rc == -EBADF, &w.counters.bugs, b"a socket was closed by a stranger")
    rc = sys_arm_reset(fd, reset)
    NP_BUG(rc == -ENOTSOCK, &w.counters.bugs, b"a socket number was taken over")
    if leg.doubted_ms:
        leg.doubted_ms = 0
        w.doubted -= 1
    leg.fd = -1
    leg.bits = 0
    fd_mark(w.core, fd, 0)       # before the kernel can give the number to somebody else
    fd_close(w, fd)


# A lent descriptor goes back: nothing of it may come up here any more.
cdef void leg_return(Worker* w, Leg* leg) noexcept nogil:
    cdef int rc = sys_epoll_delete(w.epoll, leg.fd)
    NP_BUG(rc == -EBADF, &w.counters.bugs, b"a lent socket was closed")
    fd_mark(w.core, leg.fd, 0)
    leg.fd = -1
    leg.bits = 0
