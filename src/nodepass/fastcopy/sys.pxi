# Thin system call wrappers: the only place where errno is read.
#
# Law: result >= 0 on success, minus errno otherwise. EINTR is retried where a call may
# return it; EAGAIN is the caller's business. Nothing here owns anything or touches Python.

# -> bytes read, 0 at EOF, -errno otherwise. Runs on: workers.
cdef inline ssize_t sys_recv(int fd, char* into, size_t room, int flags) noexcept nogil:
    cdef ssize_t n
    while True:
        n = recv(fd, into, room, flags | MSG_DONTWAIT)
        if n != -1:
            return n
        if errno != EINTR:
            return -errno


# -> bytes taken by the kernel, -errno otherwise; never SIGPIPE. Runs on: workers.
cdef inline ssize_t sys_send(int fd, const char* data, size_t size) noexcept nogil:
    cdef ssize_t n
    while True:
        n = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n != -1:
            return n
        if errno != EINTR:
            return -errno


# -> bytes moved, 0 at EOF of fd_in, -errno otherwise. SIGPIPE is blocked in workers: there
# is no MSG_NOSIGNAL here. No SPLICE_F_MORE: it corks the last segment. Runs on: workers.
cdef inline ssize_t sys_splice(int fd_in, int fd_out, size_t size) noexcept nogil:
    cdef ssize_t n
    while True:
        n = splice(fd_in, NULL, fd_out, NULL, size, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if n != -1:
            return n
        if errno != EINTR:
            return -errno


# -> 0 or -errno (ENOTCONN: the connection is gone). Runs on: workers.
cdef inline int sys_shutdown_write(int fd) noexcept nogil:
    if shutdown(fd, SHUT_WR) != -1:
        return 0
    return -errno


# -> the pending error of a socket as a positive errno, 0 for none; the kernel forgets it.
cdef inline int sys_socket_error(int fd) noexcept nogil:
    cdef int value = 0
    cdef socklen_t size = sizeof(value)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &value, &size) == -1:
        return errno
    return value


# -> 0 if fd is a non-blocking socket of this type, -errno otherwise. Runs on: control plane.
cdef inline int sys_check_socket(int fd, int kind) noexcept nogil:
    cdef int value = 0
    cdef socklen_t size = sizeof(value)
    cdef int flags
    if getsockopt(fd, SOL_SOCKET, SO_TYPE, &value, &size) == -1:
        return -errno
    if value != kind:
        return -EPROTOTYPE
    flags = fcntl(fd, F_GETFL)
    if flags == -1:
        return -errno
    return 0 if flags & O_NONBLOCK else -EINVAL


# -> 0 or -errno. The number is free afterwards whatever the result: Linux closes even on
# EINTR, so a retry could hit a stranger (man close(2)).
cdef inline int sys_close(int fd) noexcept nogil:
    if close(fd) != -1:
        return 0
    return -errno


# -> 0 or -errno. While armed, close() sends RST instead of FIN, and so does the kernel when
# the process dies (TCP; AF_UNIX ignores it).
cdef inline int sys_arm_reset(int fd, bint is_armed) noexcept nogil:
    cdef linger value
    value.l_onoff = is_armed
    value.l_linger = 0
    if setsockopt(fd, SOL_SOCKET, SO_LINGER, &value, sizeof(value)) != -1:
        return 0
    return -errno


# -> epoll fd or -errno.
cdef inline int sys_epoll_open() noexcept nogil:
    cdef int fd = epoll_create1(EPOLL_CLOEXEC)
    if fd != -1:
        return fd
    return -errno


# -> 0 or -errno. Edge-triggered and both directions at once, so that no further epoll_ctl
# is ever needed; EPOLLPRI because recv() stops at an urgent mark (see SEEN_URGENT).
cdef inline int sys_epoll_add(int epoll, int fd, uint64_t tag) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET
    event.data.u64 = tag
    if epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != -1:
        return 0
    return -errno


# -> 0 or -errno. A UDP socket: edge-triggered, for reading; for writing only while somebody waits
# for room, because it reports every datagram that has left.
cdef inline int sys_epoll_watch(
    int epoll, int fd, uint64_t tag, int operation, bint wants_room
) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    if wants_room:
        event.events |= EPOLLOUT
    event.data.u64 = tag
    if epoll_ctl(epoll, operation, fd, &event) != -1:
        return 0
    return -errno


# -> datagrams received, -errno otherwise. Fewer than there is room for means "drained", or that
# an error waits, which is an event of its own. Runs on: workers.
cdef inline int sys_recvmmsg(int fd, mmsghdr* messages, unsigned int count) noexcept nogil:
    cdef int n
    while True:
        n = recvmmsg(fd, messages, count, MSG_DONTWAIT, NULL)
        if n != -1:
            return n
        if errno != EINTR:
            return -errno


# -> messages taken by the kernel, > 0; -errno of the first one otherwise. Runs on: workers.
cdef inline int sys_sendmmsg(int fd, mmsghdr* messages, unsigned int count) noexcept nogil:
    cdef int n
    while True:
        n = sendmmsg(fd, messages, count, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n != -1:
            return n
        if errno != EINTR:
            return -errno


# -> 0 or -errno. An integer option.
cdef inline int sys_set(int fd, int level, int name, int value) noexcept nogil:
    if setsockopt(fd, level, name, &value, sizeof(value)) != -1:
        return 0
    return -errno


# -> >= 0 the value of an integer option, -errno otherwise.
cdef inline int sys_get(int fd, int level, int name) noexcept nogil:
    cdef int value = 0
    cdef socklen_t size = sizeof(value)
    if getsockopt(fd, level, name, &value, &size) != -1:
        return value
    return -errno


# -> bytes of a stream that its far end has not acknowledged yet, sent or not, its end among them;
# -errno otherwise. Takes no lock. Runs on: workers.
cdef inline int sys_unanswered(int fd) noexcept nogil:
    cdef int value = 0
    if ioctl(fd, SIOCOUTQ, &value) != -1:
        return value
    return -errno


# -> 0 and what the kernel knows of a TCP connection, or -errno (AF_UNIX). Runs on: workers.
cdef inline int sys_tcp_info(int fd, tcp_info* info) noexcept nogil:
    cdef socklen_t size = sizeof(tcp_info)
    memset(info, 0, sizeof(tcp_info))
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) != -1:
        return 0
    return -errno


# -> 0 and the address a socket is bound to, or -errno.
cdef inline int sys_own_name(int fd, sockaddr_in6* name) noexcept nogil:
    cdef socklen_t size = sizeof(sockaddr_in6)
    memset(name, 0, sizeof(sockaddr_in6))
    if getsockname(fd, <sockaddr*>name, &size) != -1:
        return 0
    return -errno


# -> 0: connected, or the answer is still to come; -errno otherwise. EINTR does not take a connect
# back. Runs on: workers.
cdef inline int sys_connect(int fd, sockaddr_in6* name) noexcept nogil:
    cdef socklen_t size = sizeof(sockaddr_in)
    if name.sin6_family == AF_INET6:
        size = sizeof(sockaddr_in6)
    if connect(fd, <sockaddr*>name, size) != -1 or errno == EINPROGRESS or errno == EINTR:
        return 0
    return -errno


# -> 1 if a connection to an address has itself for its peer. Runs on: workers.
cdef inline bint sys_is_mirror(int fd, sockaddr_in6* goal) noexcept nogil:
    cdef sockaddr_in6 peer
    cdef sockaddr_in6 own
    cdef socklen_t size = sizeof(peer)
    memset(&peer, 0, sizeof(peer))
    # The port stands at the same place in an IPv4 address.
    if sys_own_name(fd, &own) < 0 or own.sin6_port != goal.sin6_port:
        return 0
    if getpeername(fd, <sockaddr*>&peer, &size) == -1:
        return 0
    return memcmp(&own, &peer, sizeof(own)) == 0


# -> 0 or -errno. Explicit, because a duplicate in a forked child would keep the
# registration alive past close() (man epoll(7), Q6).
cdef inline int sys_epoll_delete(int epoll, int fd) noexcept nogil:
    cdef epoll_event event          # kernels before 2.6.9 wanted a non-NULL pointer
    if epoll_ctl(epoll, EPOLL_CTL_DEL, fd, &event) != -1:
        return 0
    return -errno


# -> number of events; 0 on timeout and on EINTR (the caller's loop comes round again).
cdef inline int sys_epoll_wait(
    int epoll, epoll_event* events, int room, int timeout_ms
) noexcept nogil:
    cdef int n = epoll_wait(epoll, events, room, timeout_ms)
    if n != -1:
        return n
    return 0 if errno == EINTR else -errno


# -> eventfd or -errno.
cdef inline int sys_eventfd() noexcept nogil:
    cdef int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if fd != -1:
        return fd
    return -errno


# -> 0 or -errno. EAGAIN means the counter is full, i.e. the reader is awake already.
cdef inline int sys_ring(int fd) noexcept nogil:
    cdef uint64_t one = 1
    while True:
        if write(fd, &one, sizeof(one)) != -1:
            return 0
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno


# -> 0 or -errno; afterwards the eventfd is not readable.
cdef inline int sys_unring(int fd) noexcept nogil:
    cdef uint64_t count = 0
    while True:
        if read(fd, &count, sizeof(count)) != -1:
            return 0
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno


# -> 1 readable, 0 timeout (or EINTR), -errno otherwise. Blocks: without the GIL only.
cdef inline int sys_wait_readable(int fd, int timeout_ms) noexcept nogil:
    cdef pollfd entry
    entry.fd = fd
    entry.events = POLLIN
    entry.revents = 0
    if poll(&entry, 1, timeout_ms) != -1:
        return 1 if entry.revents else 0
    return 0 if errno == EINTR else -errno


# -> 0 or -errno (EMFILE, ENFILE).
cdef inline int sys_pipe(int* fds) noexcept nogil:
    if pipe2(fds, O_NONBLOCK | O_CLOEXEC) != -1:
        return 0
    return -errno


# -> capacity in bytes afterwards, -errno (EPERM: over the user's budget; EBUSY).
cdef inline int sys_pipe_grow(int fd, int size) noexcept nogil:
    cdef int result = fcntl(fd, F_SETPIPE_SZ, size)
    if result != -1:
        return result
    return -errno


# -> capacity in bytes or -errno.
cdef inline int sys_pipe_size(int fd) noexcept nogil:
    cdef int result = fcntl(fd, F_GETPIPE_SZ)
    if result != -1:
        return result
    return -errno


# -> 0 and *where, or -errno. Zeroed, not reserved, resident only where touched; without
# huge pages, which would make the first byte of a table cost 2 MiB.
cdef inline int sys_map(size_t size, void** where) noexcept nogil:
    cdef void* result = mmap(NULL, size, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if result == MAP_FAILED:
        where[0] = NULL
        return -errno
    madvise(result, size, MADV_NOHUGEPAGE)      # EINVAL without THP: nothing to switch off
    where[0] = result
    return 0


# -> 0 or -errno.
cdef inline int sys_unmap(void* where, size_t size) noexcept nogil:
    if munmap(where, size) != -1:
        return 0
    return -errno


# -> 0 or -errno. The pages go back to the kernel; the next touch reads zeroes.
cdef inline int sys_forget(void* where, size_t size) noexcept nogil:
    if madvise(where, size, MADV_DONTNEED) != -1:
        return 0
    return -errno


# -> milliseconds of a clock that never jumps. The coarse one (4 ms steps) reads without
# entering the kernel and is ten times finer than the smallest idle step.
cdef inline uint64_t sys_now_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000
