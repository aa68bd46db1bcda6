using System;
using System.Linq;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class SniTests : EndToEndTest
{
    public static readonly TheoryData<int, int, int> Hellos = new()
    {
        // key share, record size, segment size
        { 32, 16384, 100_000 },
        { 32, 16384, 1 },
        { 32, 1, 50 },
        { 1_800, 16384, 1_400 },
        { 1_800, 3, 700 },
        { 15_800, 16384, 1_400 },
        { 20_000, 4_000, 100_000 },
    };

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Hellos))]
    public async Task A_client_gets_the_servers_of_the_name_it_asks_for_and_they_get_its_bytes(int keyShare, int record, int segment)
    {
        Upstream fallback = Given.Server();
        Upstream exact = Given.Server();
        Upstream below = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", fallback.Address, "--sni", "www.example.com,Example.ORG", "-u", exact.Address,
            "--sni", "*.example.com", "-u", below.Address);
        (string? Name, Upstream Expected)[] cases =
        [
            ("www.example.com", exact), ("WWW.example.com", exact), ("example.org", exact), ("a.example.com", below),
            ("b.a.example.com", below), ("example.com", fallback), ("www.example.org", fallback), (null, fallback),
        ];
        foreach ((string? name, Upstream expected) in cases)
        {
            byte[] hello = [.. Hello.Make(name, keyShare, record), .. "and what follows"u8];
            Peer client = await Given.Client(proxy);
            client.Socket.NoDelay = true;
            foreach (byte[] part in hello.Chunk(segment))
            {
                await client.Send(part);
            }

            Peer server = await expected.Accept();
            Assert.Equal(hello, await server.Receive(hello.Length));
            await client.Exchange(server, "more", "answer");
            client.Finish();
            await server.ExpectEnd();
            server.Dispose();
            await client.ExpectEnd();
            LogLine line = await proxy.Connection(client);
            Assert.Equal(
                ("--", expected.Address, hello.Length + 4, 6), (line.End, line["upstream"], line.BytesUp, line.BytesDown));
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData("GET / HTTP/1.0\r\n\r\n")]
    [InlineData("S")]
    [InlineData("\u0016\u0003\u0001\u0000\u0001\u0002")]
    [InlineData("\u0000.\u0001\u0003\u0001")]
    public async Task What_is_no_hello_goes_to_the_fallback_at_once_and_unaltered(string text)
    {
        Upstream fallback = Given.Server();
        Upstream other = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", fallback.Address, "--sni", "*.example.com", "-u", other.Address,
            "--preread-timeout", "1h");
        (Peer client, Peer server) = await Given.Bridge(proxy, fallback, text);
        await server.ReceiveText(text);
        await client.Exchange(server, "more", "answer");
        Assert.Equal(0, other.Accepted);
    }

    [Fact(Timeout = Quick)]
    public async Task With_nobody_to_serve_a_client_it_is_reset_with_the_reason()
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "--sni", "a.example", "-u", "echo", "--preread-timeout", "2s");
        byte[] endless = [22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff, .. new byte[16_380], 22, 3, 1, 0x40, 0, .. new byte[16_384]];
        (byte[] Bytes, string End, string Reason)[] cases =
        [
            (Hello.Make("b.example"), "PR", "no server for b.example"),
            (Hello.Make(null), "PR", "no server for a client with no TLS server name"),
            (Hello.Records(Hello.Message("a b"u8.ToArray()), 16384), "PR", "no server for a client with a malformed TLS hello"),
            ("SSH-2.0-x\r\n"u8.ToArray(), "PR", "no server for a client with no TLS hello"),
            (endless, "PR", "TLS hello too long"),
            (Hello.Make("a.example")[..^1], "cR", "no TLS hello in time"),
            ([], "cR", "no TLS hello in time"),
        ];
        foreach ((byte[] bytes, string end, string reason) in cases)
        {
            Peer client = await Given.Client(proxy);
            await client.Send(bytes);
            await client.ExpectReset();
            LogLine line = await proxy.Connection(client);
            Assert.Equal((end, reason, "-"), (line.End, line.Reason, line["upstream"]));
        }

        Peer early = await Given.Client(proxy);
        await early.Send(Hello.Make("a.example").AsMemory(0, 50));
        early.Finish();
        await early.ExpectReset();
        Assert.Equal("client closed before the end of the TLS hello", (await proxy.Connection(early)).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task A_PROXY_header_and_a_hello_may_come_in_one_segment()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "--accept-proxy", "127.0.0.1", "--send-proxy", "v1", "--sni", "*.example", "-u", upstream.Address);
        const string Header = "PROXY TCP4 192.0.2.1 198.51.100.2 40001 443\r\n";
        byte[] all = [.. Encoding.ASCII.GetBytes(Header), .. Hello.Make("a.example", 1_800)];
        foreach (int segment in new[] { all.Length, 10 })
        {
            Peer client = await Given.Client(proxy);
            foreach (byte[] part in all.Chunk(segment))
            {
                await client.Send(part);
            }

            Peer server = await upstream.Accept();
            Assert.Equal(all, await server.Receive(all.Length));
            await client.Exchange(server, "more", "answer");
            client.Finish();
            server.Dispose();
            await client.ExpectEnd();
        }

        Assert.All(
            await proxy.LinesOf("connection", 2),
            line => Assert.Equal(("192.0.2.1:40001", all.Length - Header.Length + 4), (line["client"], line.BytesUp)));
    }

    [Fact(Timeout = Quick)]
    public async Task A_group_of_several_servers_is_balanced_and_survives_one_that_refuses()
    {
        Upstream first = Given.Echo();
        Upstream second = Given.Echo();
        string file = Given.Write(
            "conf",
            $"""
            listen 127.0.0.1:0
            upstream discard
            sni a.example
            upstream {first.Address}
            upstream 127.0.0.1:{Given.RefusingPort()}
            upstream {second.Address}

            """);
        ProxyProcess proxy = (await Given.Proxy("-c", file)).Tolerate("server"); // it is said to be down
        byte[] hello = Hello.Make("a.example");
        for (int i = 0; i < 20; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Send(hello);
            Assert.Equal(hello, await client.Receive(hello.Length));
        }

        Assert.Equal(20, first.Accepted + second.Accepted);
        Assert.InRange(first.Accepted, 5, 15);
    }

    [Fact(Timeout = Slow)]
    public async Task Openssl_clients_get_the_certificate_of_the_name_they_ask_for()
    {
        string openssl = Tool.Need("openssl", "openssl");
        int port = Given.FreePorts(3);
        string[] names = ["alpha", "beta", "gamma"];
        for (int i = 0; i < names.Length; i++)
        {
            (await Tool.Run(
                openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", $"/CN={names[i]}",
                "-keyout", Given.Path($"{names[i]}.key"), "-out", Given.Path($"{names[i]}.pem"))).Good();
            Tool.Background(
                Given, openssl, "s_server", "-accept", $"127.0.0.1:{port + i}", "-key", Given.Path($"{names[i]}.key"),
                "-cert", Given.Path($"{names[i]}.pem"), "-www");
        }

        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", $"127.0.0.1:{port + 2}", "--sni", "www.alpha.example", "-u", $"127.0.0.1:{port}",
            "--sni", "*.beta.example", "-u", $"127.0.0.1:{port + 1}");
        (string[] Words, string Expected)[] cases =
        [
            (["-servername", "www.alpha.example"], "alpha"),
            (["-servername", "WWW.ALPHA.EXAMPLE"], "alpha"),
            (["-servername", "a.b.beta.example"], "beta"),
            (["-servername", "beta.example"], "gamma"),
            (["-noservername"], "gamma"),
            (["-servername", "www.alpha.example", "-tls1_2"], "alpha"),
        ];
        foreach ((string[] words, string expected) in cases)
        {
            string said = "";
            for (int tries = 0; !said.Contains("BEGIN CERTIFICATE", StringComparison.Ordinal); tries++)
            {
                Assert.True(tries < 50, $"no TLS: {said}");
                Outcome outcome = await Tool.Run(
                    openssl, ["s_client", "-connect", $"127.0.0.1:{proxy.Port}", .. words], 20, input: "GET / HTTP/1.0\r\n\r\n");
                said = outcome.Out + outcome.Err;
                await Wait.Pause(tries == 0 ? 0 : 100); // the servers of openssl take a moment to start
            }

            Assert.Matches($@"subject=CN ?= ?{expected}\b", said);
        }
    }
}

internal static class WithFirstWords
{
    /// <summary>A server behind --sni is connected to only when the client has spoken.</summary>
    public static async Task<(Peer Client, Peer Server)> Bridge(
        this Given given, ProxyProcess proxy, Upstream upstream, string words)
    {
        Peer client = await given.Client(proxy);
        await client.Send(words);
        return (client, await upstream.Accept());
    }
}
