using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ProxyProtocolTests : EndToEndTest
{
    private const string Header = "PROXY TCP4 192.0.2.1 198.51.100.2 40001 443\r\n";

    private static readonly string[] Accept = ["--accept-proxy", "127.0.0.0/8,::1"];

    private static byte[] HeaderV2 { get; } =
        Convert.FromHexString("0d0a0d0a000d0a515549540a21110012c0000201c63364029c4101bb" + "040003616263");

    public static readonly TheoryData<bool> Versions = [false, true];

    // ---- received

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Versions))]
    public async Task The_address_in_a_header_is_the_clients_and_the_rest_goes_on_unaltered(bool isV2)
    {
        byte[] header = isV2 ? HeaderV2 : Encoding.ASCII.GetBytes(Header);
        Pattern pattern = new(1);
        byte[] data = new byte[3_000];
        pattern.Fill(0, data);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", upstream.Address, .. Accept]);
        (int Start, int Length)[] cuts = [(0, header.Length), (0, header.Length + 100), (0, header.Length + 3_000), (0, 1), (0, 5)];
        foreach ((_, int first) in cuts)
        {
            byte[] all = [.. header, .. data];
            Peer client = await Given.Client(proxy);
            await client.Send(all.AsMemory(0, first));
            await Wait.Pause(20);
            await client.Send(all.AsMemory(first));
            Peer server = await upstream.Accept();
            await server.Receive(pattern, data.Length);
            await server.Send("answer");
            await client.ReceiveText("answer");
            client.Finish();
            await server.ExpectEnd();
            server.Dispose();
            await client.ExpectEnd();
        }

        List<LogLine> lines = await proxy.LinesOf("connection", cuts.Length);
        Assert.All(lines, line => Assert.Equal(
            ("192.0.2.1:40001", "--", 3_000, 6), (line["client"], line.End, line.BytesUp, line.BytesDown)));
    }

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Versions))]
    public async Task A_header_may_come_byte_by_byte(bool isV2)
    {
        byte[] header = isV2 ? HeaderV2 : Encoding.ASCII.GetBytes(Header);
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept]);
        Peer client = await Given.Client(proxy);
        client.Socket.NoDelay = true;
        foreach (byte b in header)
        {
            await client.Send((byte[])[b]);
            await Wait.Pause(2);
        }

        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        LogLine line = await proxy.Connection("192.0.2.1:40001");
        Assert.Equal(("--", 5, 5), (line.End, line.BytesUp, line.BytesDown));
    }

    [Theory(Timeout = Quick)]
    [InlineData("GET / HTTP/1.1\r\n\r\n", "no PROXY header")]
    [InlineData("\r\n\r\n", "client closed before the end of the PROXY header")]
    [InlineData("PROXY TCP4 192.0.2.1", "client closed before the end of the PROXY header")]
    [InlineData("", "client closed before the end of the PROXY header")]
    [InlineData("PROXY TCP4 192.0.2.1 198.51.100.2 40001 99999\r\nx", "malformed PROXY header 'PROXY TCP4 192.0.2.1 198.51.100.2 40001 99999'")]
    [InlineData("PROXY TCP4 \u0007 \" = 1\r\nx", "malformed PROXY header 'PROXY TCP4 \u0007 \" = 1'")]
    [InlineData("PROXY UNKNOWN 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789\r\n",
        "PROXY header longer than 107 bytes")]
    public async Task Without_a_good_header_a_sender_is_reset_with_the_reason(string text, string reason)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", upstream.Address, .. Accept]);
        Peer client = await Given.Client(proxy);
        await client.Send(text);
        client.Finish();
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        bool isClosed = reason.StartsWith("client", StringComparison.Ordinal);
        Assert.Equal((isClosed ? "CR" : "PR", reason), (line.End, line.Reason));
        Assert.Equal(("-", "-", 0, -1), (line["upstream"], line["server"], line.BytesUp, line.Number("connect_ms")));
        Assert.Equal(0, upstream.Accepted);
    }

    [Theory(Timeout = Quick)]
    [InlineData("0d0a0d0a000d0a515549540a211110000000", "PROXY header longer than 4096 bytes")]
    [InlineData("0d0a0d0a000d0a515549540a2111000b0000000000000000000000", "PROXY header shorter than its addresses")]
    [InlineData("0d0a0d0a000d0a515549540a21110013c0000201c63364029c4101bb03000400000000", "PROXY header with a wrong checksum")]
    [InlineData("0d0a0d0a000d0a515549540a4111000c", "PROXY header of an unknown version or command")]
    public async Task A_bad_header_of_version_2_is_not_waited_for(string hex, string reason)
    {
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept]);
        Peer client = await Given.Client(proxy);
        await client.Send(Convert.FromHexString(hex));
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("PR", reason), (line.End, line.Reason));
    }

    [Theory(Timeout = Quick)]
    [InlineData("")]
    [InlineData("PROXY TCP4 192")]
    public async Task A_header_that_does_not_come_in_time_is_not_waited_for(string beginning)
    {
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept, "--preread-timeout", "500ms"]);
        Stopwatch clock = Stopwatch.StartNew();
        Peer client = await Given.Client(proxy);
        await client.Send(beginning);
        await client.ExpectReset();
        Assert.InRange(clock.ElapsedMilliseconds, 450, 5_000);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("cR", "no PROXY header in time"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task A_client_that_resets_before_its_header_and_one_that_the_end_of_the_process_finds_there()
    {
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept, "--drain-timeout", "300ms", "-v"]);
        Peer client = await Given.Client(proxy);
        string address = client.Local;
        await client.Send("PROX");
        await proxy.Line("accepted");
        client.Reset();
        LogLine line = await proxy.Connection(address);
        Assert.Equal(("CR", "client reset"), (line.End, line.Reason));

        client = await Given.Client(proxy);
        await proxy.LinesOf("accepted", 2);
        Assert.Equal(0, await proxy.Stop());
        await client.ExpectReset();
        line = await proxy.Connection(client);
        Assert.Equal(("KR", "shutdown"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task From_others_no_header_is_read()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--accept-proxy", "192.0.2.0/24");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await server.Send("I speak first");
        await client.ReceiveText("I speak first");
        await client.Send(Header);
        await server.ReceiveText(Header);
        client.Finish();
        server.Dispose();
        Assert.Equal(Header.Length, (await proxy.Connection(client)).BytesUp);
    }

    [Fact(Timeout = Quick)]
    public async Task Local_and_unknown_keep_the_real_address()
    {
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept]);
        byte[][] headers =
            [Encoding.ASCII.GetBytes("PROXY UNKNOWN\r\n"), Convert.FromHexString("0d0a0d0a000d0a515549540a20000000")];
        foreach (byte[] header in headers)
        {
            Peer client = await Given.Client(proxy);
            await client.Send(header);
            await client.Ask("hello");
            client.Finish();
            await client.ExpectEnd();
            Assert.Equal("--", (await proxy.Connection(client)).End);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Who_has_not_sent_a_header_yet_has_a_place_among_the_connections()
    {
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept, "--max-connections", "1", "-v"]);
        Peer silent = await Given.Client(proxy);
        await proxy.Line("accepted");
        Peer second = await Given.Client(proxy);
        await second.ExpectEnd();
        Assert.Equal("connection limit", (await proxy.Connection(second)).Reason);
        silent.Reset();
        await proxy.Line("connection", l => l.End == "CR");
        Peer third = await Given.Client(proxy);
        await third.Send(Header);
        await third.Ask("hello");
    }

    [Theory(Timeout = Quick)]
    [InlineData("server", "--max-bytes-up", "byte quota up")]
    [InlineData("echo", "--max-bytes-up", "byte quota up")]
    [InlineData("echo", "--max-bytes-down", "byte quota down")]
    [InlineData("discard", "--max-bytes-up", "byte quota up")]
    public async Task What_comes_with_the_header_counts_against_the_quota(string kind, string option, string reason)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            ["127.0.0.1:0", kind == "server" ? upstream.Address : kind, .. Accept, option, "10"]);
        foreach (string text in new[] { "0123456789", "0123456789abcdef" })
        {
            Peer client = await Given.Client(proxy);
            await client.Send(Header + text);
            if (kind == "server")
            {
                Peer server = await upstream.Accept();
                Assert.Equal("0123456789", Encoding.ASCII.GetString(await server.ReceiveToEnd()));
                server.Dispose();
            }

            (byte[] data, _) = await client.Drain();
            Assert.Equal(kind == "echo" ? "0123456789" : "", Encoding.ASCII.GetString(data));
        }

        List<LogLine> lines = await proxy.LinesOf("connection", 2);
        Assert.All(lines, line => Assert.Equal(("PD", reason, 10), (line.End, line.Reason, line.BytesUp)));
    }

    // ---- sent

    [Fact(Timeout = Quick)]
    public async Task A_header_goes_to_the_server_before_all_else()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", upstream.Address, "--send-proxy", "v1",
            "-l", "127.0.0.1:0", "-u", upstream.Address, "--send-proxy", "v2",
            "-l", "[::1]:0", "-u", upstream.Address, "--send-proxy", "v1");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream); // it comes although the client has said nothing
        await server.ReceiveText($"PROXY TCP4 127.0.0.1 127.0.0.1 {Port(client)} {proxy.Port}\r\n");
        await client.Exchange(server, "hello", "world");
        client.Finish();
        server.Dispose();
        LogLine line = await proxy.Connection(client);
        Assert.Equal((5, 5), (line.BytesUp, line.BytesDown)); // the header is ours, not the client's

        (client, server) = await Given.Bridge(proxy, upstream, 1);
        byte[] header = await server.Receive(28);
        Assert.Equal("0d0a0d0a000d0a515549540a2111000c7f0000017f000001", Convert.ToHexStringLower(header[..24]));
        Assert.Equal((Port(client), proxy.PortOf(1)), ((header[24] << 8) | header[25], (header[26] << 8) | header[27]));
        await client.Exchange(server, "hello", "world");

        (client, server) = await Given.Bridge(proxy, upstream, 2);
        await server.ReceiveText($"PROXY TCP6 ::1 ::1 {Port(client)} {proxy.PortOf(2)}\r\n");
    }

    [Theory(Timeout = Quick)]
    [InlineData("v1", "50524f585920554e4b4e4f574e0d0a")]
    [InlineData("v2", "0d0a0d0a000d0a515549540a20000000")]
    public async Task A_check_speaks_for_nobody(string version, string hex)
    {
        Upstream upstream = Given.Server();
        await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "--send-proxy", version, "--check", "200ms", "--check-send", "PING");
        Peer server = await upstream.Accept();
        Assert.Equal(hex + "50494e47", Convert.ToHexStringLower(await server.ReceiveToEnd()));
    }

    [Fact(Timeout = Quick)]
    public async Task A_chain_of_proxies_passes_the_first_clients_address_on()
    {
        Upstream upstream = Given.Server();
        ProxyProcess last = await Given.Proxy(["127.0.0.1:0", upstream.Address, .. Accept, "--send-proxy", "v1"]);
        ProxyProcess middle = await Given.Proxy(["127.0.0.1:0", $"127.0.0.1:{last.Port}", .. Accept, "--send-proxy", "v2"]);
        Peer client = await Given.Client(middle);
        await client.Send(Header + "hello");
        Peer server = await upstream.Accept();
        await server.ReceiveText(Header + "hello");
        await client.Send(" again");
        await server.ReceiveText(" again");
        client.Finish();
        await server.ExpectEnd();
        server.Dispose();
        await client.ExpectEnd();
        foreach (ProxyProcess proxy in new[] { last, middle })
        {
            LogLine line = await proxy.Connection("192.0.2.1:40001");
            Assert.Equal(("--", 11), (line.End, line.BytesUp));
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Unix_sockets_are_senders_and_receivers_too()
    {
        Upstream upstream = Given.Server(new UnixDomainSocketEndPoint(Given.Path("server")));
        string listen = Given.Path("listen");
        ProxyProcess proxy = await Given.Proxy(
            "-l", $"unix:{listen}", "-u", upstream.Address, "--accept-proxy", "unix", "--send-proxy", "v2",
            "-l", "127.0.0.1:0", "-u", upstream.Address, "--send-proxy", "v1");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream, 1);
        await server.ReceiveText($"PROXY TCP4 127.0.0.1 127.0.0.1 {Port(client)} {proxy.PortOf(1)}\r\n");

        client = await Given.Client(proxy);
        await client.Send("PROXY UNKNOWN\r\nhello");
        server = await upstream.Accept();
        byte[] header = await server.Receive(232);
        Assert.Equal("0d0a0d0a000d0a515549540a213100d8", Convert.ToHexStringLower(header[..16]));
        Assert.Equal(new byte[108], header[16..124]);
        Assert.Equal(listen, Encoding.UTF8.GetString(header[124..]).TrimEnd('\0'));
        await server.ReceiveText("hello");

        client = await Given.Client(proxy);
        await client.Send(HeaderV2);
        server = await upstream.Accept();
        Assert.Equal(
            [.. HeaderV2[..14], 0, 12, .. HeaderV2[16..28]], await server.Receive(28)); // the same without its TLV
        client.Finish();
        server.Dispose();
        await proxy.Connection("192.0.2.1:40001");
    }

    [Fact(Timeout = Quick)]
    public async Task The_built_in_servers_get_no_header_and_a_reset_of_a_server_is_its_own()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "--send-proxy", "v2", "-l", "127.0.0.1:0", "-u", upstream.Address,
            "--send-proxy", "v2");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        (client, Peer server) = await Given.Bridge(proxy, upstream, 1);
        await server.Receive(10);
        server.Reset();
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("SD", "upstream reset"), (line.End, line.Reason));
    }

    // ---- with others

    [Theory(Timeout = Slow)]
    [InlineData("v1")]
    [InlineData("v2")]
    public async Task Nginx_and_haproxy_understand_what_is_sent(string version)
    {
        string curl = Tool.Need("curl", "curl");
        string nginx = Tool.Need("nginx", "nginx");
        string haproxy = Tool.Need("haproxy", "haproxy");
        int port = Given.FreePorts(2);
        string configuration = Given.Write(
            "nginx.conf",
            $$"""
            daemon off; pid {{Given.Path("nginx.pid")}}; error_log stderr; {{(Tool.IsRoot ? "user root;" : "")}}
            events { worker_connections 512; }
            http {
              access_log off; client_body_temp_path {{Given.Path("body")}}; proxy_temp_path {{Given.Path("proxy")}};
              fastcgi_temp_path {{Given.Path("fcgi")}}; uwsgi_temp_path {{Given.Path("uwsgi")}}; scgi_temp_path {{Given.Path("scgi")}};
              server {
                listen 127.0.0.1:{{port}} proxy_protocol;
                return 200 "$proxy_protocol_addr:$proxy_protocol_port $proxy_protocol_server_addr:$proxy_protocol_server_port";
              }
            }
            """);
        Tool.Background(Given, nginx, "-p", Given.Folder, "-c", configuration);
        configuration = Given.Write(
            "haproxy.cfg",
            $"""
            defaults
              mode http
              timeout client 10s
              timeout server 10s
              timeout connect 5s
            frontend f
              bind 127.0.0.1:{port + 1} accept-proxy
              bind unix@{Given.Path("haproxy")} accept-proxy
              http-request return status 200 content-type text/plain lf-string "%[src]:%[src_port] %[dst]:%[dst_port]"

            """);
        Tool.Background(Given, haproxy, "-db", "-f", configuration);
        await RealProgramsTests.WaitForPort(port);
        await RealProgramsTests.WaitForPort(port + 1);
        ProxyProcess proxy = await Given.Proxy(
            "--send-proxy", version, "-l", "127.0.0.1:0", "-u", $"127.0.0.1:{port}", "-l", "127.0.0.1:0", "-u",
            $"127.0.0.1:{port + 1}", "-l", "127.0.0.1:0", "-u", $"unix:{Given.Path("haproxy")}");
        for (int listen = 0; listen < 3; listen++)
        {
            int own = Given.FreePorts(1);
            string said = (await Tool.Run(
                curl, "-sS", "--max-time", "20", "--local-port", $"{own}", "--interface", "127.0.0.1",
                $"http://127.0.0.1:{proxy.PortOf(listen)}/")).Good();
            Assert.Equal($"127.0.0.1:{own} 127.0.0.1:{proxy.PortOf(listen)}", said);
        }
    }

    [Theory(Timeout = Slow)]
    [InlineData("send-proxy")]
    [InlineData("send-proxy-v2")]
    [InlineData("send-proxy-v2 proxy-v2-options crc32c,unique-id")]
    public async Task Haproxy_is_understood_and_so_is_curl(string option)
    {
        string haproxy = Tool.Need("haproxy", "haproxy");
        string curl = Tool.Need("curl", "curl");
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", "echo", .. Accept]);
        int port = Given.FreePorts(1);
        string configuration = Given.Write(
            "haproxy.cfg",
            $"""
            defaults
              mode tcp
              unique-id-format %ci-%cp
              timeout client 10s
              timeout server 10s
              timeout connect 5s
            frontend f
              bind 127.0.0.1:{port}
              default_backend b
            backend b
              server s 127.0.0.1:{proxy.Port} {option} check inter 200ms check-send-proxy

            """);
        Tool.Background(Given, haproxy, "-db", "-f", configuration);
        await RealProgramsTests.WaitForPort(port);
        Peer client = await Given.Client(new IPEndPoint(IPAddress.Loopback, port));
        Pattern pattern = new(7);
        await client.Send(pattern, 100_000);
        await client.Receive(pattern, 100_000);
        client.Finish();
        await client.ExpectEnd();
        LogLine line = await proxy.Connection(client);
        Assert.Equal((100_000, 100_000), (line.BytesUp, line.BytesDown));

        // a check speaks for haproxy itself, with the address of its own socket
        LogLine check = await proxy.Line("connection", l => l.BytesUp == 0 && l["client"] != client.Local && l.End is not ("PR" or "cR"));
        Assert.StartsWith("127.0.0.1:", check["client"], StringComparison.Ordinal);

        string web = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        Upstream upstream = Given.Server(async peer =>
        {
            while ((await peer.ReceiveLine()).Length > 1)
            {
            }

            await peer.Send(web);
        });
        ProxyProcess second = await Given.Proxy(["127.0.0.1:0", upstream.Address, .. Accept]);
        Assert.Equal("ok", (await Tool.Run(
            curl, "-sS", "--max-time", "20", "--haproxy-protocol", $"http://127.0.0.1:{second.Port}/")).Good());
    }

    private static int Port(Peer client) => ((IPEndPoint)client.Socket.LocalEndPoint!).Port;
}
