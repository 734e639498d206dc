# What the kernel and the C library offer and libc.* of Cython does not declare.
# Declarations only; everything here is called without the GIL.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/types.h>" nogil:
    ctypedef int pid_t
    ctypedef long off_t

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    pid_t getpid()
    ssize_t read(int fd, void* into, size_t room)
    ssize_t write(int fd, const void* data, size_t size)
    int pipe2(int* fds, int flags)

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    ssize_t splice(int fd_in, void* off_in, int fd_out, void* off_out, size_t size,
                   unsigned int flags)
    int O_NONBLOCK
    int O_CLOEXEC
    int F_GETFL
    int F_SETPIPE_SZ
    int F_GETPIPE_SZ
    unsigned int SPLICE_F_MOVE
    unsigned int SPLICE_F_NONBLOCK

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    short POLLIN

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int start, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int room, int timeout_ms)
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_DEL
    int EPOLL_CTL_MOD
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLPRI
    uint32_t EPOLLERR
    uint32_t EPOLLHUP
    uint32_t EPOLLRDHUP
    uint32_t EPOLLET

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    cdef struct linger:
        int l_onoff
        int l_linger
    ssize_t recv(int fd, void* into, size_t room, int flags)
    ssize_t send(int fd, const void* data, size_t size, int flags)
    int shutdown(int fd, int how)
    int getsockopt(int fd, int level, int name, void* value, socklen_t* size)
    int setsockopt(int fd, int level, int name, const void* value, socklen_t size)
    int SHUT_WR
    int SOL_SOCKET
    int SO_ERROR
    int SO_KEEPALIVE
    int SO_LINGER
    int SO_TYPE
    int SO_DOMAIN
    int SOCK_STREAM
    int SOCK_DGRAM
    int AF_INET
    int AF_INET6
    int MSG_TRUNC
    int MSG_CTRUNC
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int MSG_PEEK

# The types of the fields differ between C libraries; assignments convert.
cdef extern from "<sys/socket.h>" nogil:
    cdef struct sockaddr:
        unsigned short sa_family
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    cdef struct msghdr:
        void* msg_name
        socklen_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr* CMSG_FIRSTHDR(msghdr* header)
    cmsghdr* CMSG_NXTHDR(msghdr* header, cmsghdr* part)
    unsigned char* CMSG_DATA(cmsghdr* part)
    size_t CMSG_SPACE(size_t size)
    size_t CMSG_LEN(size_t size)
    int getsockname(int fd, sockaddr* name, socklen_t* size)
    int getpeername(int fd, sockaddr* name, socklen_t* size)
    int connect(int fd, const sockaddr* name, socklen_t size)
    int recvmmsg(int fd, mmsghdr* messages, unsigned int count, int flags, void* timeout)
    int sendmmsg(int fd, mmsghdr* messages, unsigned int count, int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<netinet/tcp.h>" nogil:
    cdef struct tcp_info:
        uint8_t tcpi_retransmits
        uint8_t tcpi_probes
        uint8_t tcpi_backoff
        uint32_t tcpi_last_data_recv
        uint32_t tcpi_last_ack_recv
    int TCP_INFO
    int TCP_KEEPIDLE
    int TCP_KEEPINTVL

# Of newer kernels than the C library may know, and what clashes with it (linux/sockios.h).
cdef extern from * nogil:
    """
    #ifndef TCP_RTO_MAX_MS
    #define TCP_RTO_MAX_MS 44
    #endif
    #ifndef SIOCOUTQ
    #define SIOCOUTQ 0x5411
    #endif
    """
    int TCP_RTO_MAX_MS
    unsigned long SIOCOUTQ

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP
    cdef struct in_addr:
        uint32_t s_addr
    cdef struct in6_addr:
        uint8_t s6_addr[16]
    cdef struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    cdef struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    cdef struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
    cdef struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex
    int IPPROTO_IP
    int IPPROTO_IPV6
    int IP_PKTINFO
    int IPV6_PKTINFO
    int IPV6_RECVPKTINFO

cdef extern from "<arpa/inet.h>" nogil:
    uint16_t htons(uint16_t port)
    uint32_t htonl(uint32_t label)
    int inet_pton(int family, const char* text, void* into)

# Younger than the oldest C library that wheels are built for; numbers of include/uapi/linux.
cdef extern from *:
    """
    #include <sys/socket.h>
    #include <netinet/in.h>
    #ifndef SOL_UDP
    #define SOL_UDP 17
    #endif
    #ifndef UDP_SEGMENT
    #define UDP_SEGMENT 103
    #endif
    #ifndef UDP_GRO
    #define UDP_GRO 104
    #endif
    #ifndef SO_RXQ_OVFL
    #define SO_RXQ_OVFL 40
    #endif
    """
    int SOL_UDP
    int UDP_SEGMENT
    int UDP_GRO
    int SO_RXQ_OVFL

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* where, size_t size, int protection, int flags, int fd, off_t offset)
    int munmap(void* where, size_t size)
    int madvise(void* where, size_t size, int advice)
    void* MAP_FAILED
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    int MAP_NORESERVE
    int MADV_DONTNEED
    int MADV_NOHUGEPAGE

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    ctypedef int clockid_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(clockid_t clock, timespec* now)
    clockid_t CLOCK_MONOTONIC
    clockid_t CLOCK_MONOTONIC_COARSE

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t* signals)
    int sigdelset(sigset_t* signals, int number)
    int SIG_SETMASK
    int SIGSEGV
    int SIGBUS
    int SIGFPE
    int SIGILL

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_attr_t:
        pass
    int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                       void* (*start)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** result)
    int pthread_detach(pthread_t thread)
    int pthread_sigmask(int how, const sigset_t* signals, sigset_t* before)
    int pthread_setname_np(pthread_t thread, const char* name)
