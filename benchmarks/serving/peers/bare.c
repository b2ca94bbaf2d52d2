/* The least that an HTTP server of a model can do on one core: what a machine's sockets and copies cost, and no more.
 *
 * One thread takes what sockets have, runs the rows of up to MOST requests, and writes the answers. Requests are taken
 * for what the benchmark sends: one row of binary tensors each, under 64 KiB, one at a time on a connection. Nothing is
 * checked, counted, bounded or timed, and what is overloaded is not refused: it is a bound for servers, and none itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 64
#define HELD 65536
#define WAITING 4096

typedef struct {
  int fd;
  size_t held, row_at, end;
  char data[HELD];
} Connection;

/* Find where the row and the request end, once the head is whole. */
static int read_head(Connection *c) {
  char *head_end = memmem(c->data, c->held, "\r\n\r\n", 4);
  if (!head_end) return 0;
  size_t length = 0, json = 0;
  *head_end = 0;
  for (char *at = c->data; (at = strcasestr(at, "content-length:")); at += 15) {
    if (at[-1] == '\n') length = strtoul(at + 15, NULL, 10);
    else json = strtoul(at + 15, NULL, 10); /* inference-header-content-length */
  }
  *head_end = '\r';
  c->row_at = (size_t)(head_end + 4 - c->data) + json;
  c->end = (size_t)(head_end + 4 - c->data) + length;
  return 1;
}

/* Serve for ever. rows [most, row_bytes] and outs [most, out_bytes] are what run(n) reads and writes; head is what every
 * answer begins with. Gives 1 where a run failed. */
int serve(int port, int most, char *rows, size_t row_bytes, char *outs, size_t out_bytes, const char *head, int (*run)(int)) {
  static Connection *waiting[WAITING];
  unsigned first = 0, last = 0;
  size_t head_bytes = strlen(head);
  char *answer = malloc(head_bytes + out_bytes);
  int poll = epoll_create1(0), yes = 1;
  struct epoll_event event = {.events = EPOLLIN}, events[256];
  if (!answer || most > MOST) return 1;
  memcpy(answer, head, head_bytes);
  epoll_ctl(poll, EPOLL_CTL_ADD, port, &event);
  for (;;) {
    int found = epoll_wait(poll, events, 256, first == last ? -1 : 0);
    for (int i = 0; i < found; i++) {
      Connection *c = events[i].data.ptr;
      if (!c) {
        c = calloc(1, sizeof *c);
        c->fd = accept4(port, NULL, NULL, SOCK_NONBLOCK);
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        event.data.ptr = c;
        epoll_ctl(poll, EPOLL_CTL_ADD, c->fd, &event);
        continue;
      }
      ssize_t got = recv(c->fd, c->data + c->held, HELD - 1 - c->held, 0);
      if (got < 0 && errno == EAGAIN) continue;
      if (got <= 0) {
        close(c->fd);
        c->fd = -1; /* its memory stays: it may still wait for a run */
        continue;
      }
      c->held += (size_t)got;
      if ((c->end || read_head(c)) && c->held >= c->end) waiting[last++ % WAITING] = c;
    }
    int n = 0;
    Connection *batch[MOST];
    for (; first != last && n < most; n++) {
      batch[n] = waiting[first++ % WAITING];
      memcpy(rows + (size_t)n * row_bytes, batch[n]->data + batch[n]->row_at, row_bytes);
    }
    if (!n) continue;
    if (run(n)) return 1;
    for (int i = 0; i < n; i++) {
      memcpy(answer + head_bytes, outs + (size_t)i * out_bytes, out_bytes);
      batch[i]->held = batch[i]->end = 0;
      if (batch[i]->fd >= 0) send(batch[i]->fd, answer, head_bytes + out_bytes, MSG_NOSIGNAL);
    }
  }
}
