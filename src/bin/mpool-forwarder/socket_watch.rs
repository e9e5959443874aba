//! Whether something lies unread on a socket, for one who asks far more often than
//! something comes. On Linux that is a look at the list of what is ready in an epoll of the
//! socket's own, which takes less than half the time of a call that locks the socket.

use std::io;
use std::os::fd::OwnedFd;

/// A socket that is looked at and never read.
#[derive(Debug)]
pub struct SocketWatch {
    // An epoll forgets a socket that nobody has open any more, and would call it silent.
    #[cfg_attr(target_os = "linux", expect(dead_code, reason = "it is kept open"))]
    socket: std::net::TcpStream,
    #[cfg(target_os = "linux")]
    ready: OwnedFd,
}

impl SocketWatch {
    /// Of a socket that does not block. Fails where the system allows no descriptor more, or
    /// no epoll.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        let ready = {
            use rustix::event::epoll;
            let ready = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            // Not by edges: what has been told of once and not been read still counts.
            let data = epoll::EventData::new_u64(0);
            epoll::add(&ready, &socket, data, epoll::EventFlags::IN)?;
            ready
        };
        Ok(Self {
            socket: socket.into(),
            #[cfg(target_os = "linux")]
            ready,
        })
    }

    /// Whether nothing has come that has not been read. A socket that is closed or broken
    /// has something to say. For one at a time: two who look at one epoll at once may hide
    /// from each other what is ready.
    #[cfg(target_os = "linux")]
    pub fn is_silent(&mut self) -> bool {
        use rustix::event::{Timespec, epoll};
        use std::mem::MaybeUninit;
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut event = [MaybeUninit::uninit()];
        let ready = epoll::wait(&self.ready, &mut event, Some(&at_once));
        ready.is_ok_and(|(events, _)| events.is_empty())
    }

    #[cfg(not(target_os = "linux"))]
    pub fn is_silent(&mut self) -> bool {
        let peeked = self.socket.peek(&mut [0]);
        peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    fn watched() -> (SocketWatch, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        here.set_nonblocking(true).unwrap();
        let watch = SocketWatch::new(here.try_clone().unwrap().into()).unwrap();
        (watch, here, listener.accept().unwrap().0)
    }

    #[test]
    fn what_has_come_counts_until_it_has_been_read() {
        let (mut watch, mut here, mut far) = watched();
        for _ in 0..3 {
            assert!(watch.is_silent());
            far.write_all(b"ab").unwrap();
            for mut left in [[0], [0]] {
                assert!(!watch.is_silent());
                assert!(!watch.is_silent(), "a look takes nothing away");
                here.read_exact(&mut left).unwrap();
            }
        }
        assert!(watch.is_silent());
    }

    #[test]
    fn an_end_is_no_silence() {
        let (mut watch, _here, far) = watched();
        far.shutdown(Shutdown::Write).unwrap();
        assert!(!watch.is_silent());
        let (mut watch, here, _far) = watched();
        here.shutdown(Shutdown::Both).unwrap();
        assert!(!watch.is_silent());
    }

    #[test]
    fn a_socket_that_its_reader_has_closed_still_counts() {
        let (mut watch, here, mut far) = watched();
        drop(here);
        assert!(watch.is_silent());
        far.write_all(b"a").unwrap();
        assert!(!watch.is_silent());
    }

    #[test]
    fn a_connection_that_breaks_is_no_silence() {
        let (mut watch, mut here, far) = watched();
        (&far).write_all(b"a").unwrap();
        // What came before is unread at the far end, so that closing it breaks the connection.
        here.write_all(b"b").unwrap();
        assert_eq!(here.read(&mut [0; 9]).unwrap(), 1);
        drop(far);
        assert!(!watch.is_silent());
        assert!(here.read(&mut [0; 9]).is_err());
        assert!(!watch.is_silent(), "the reader has heard of it");
    }
}
