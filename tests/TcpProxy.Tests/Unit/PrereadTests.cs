using System;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using Xunit;

namespace TcpProxy.Tests;

public sealed class PrereadTests
{
    private const string Signature = "0d0a0d0a000d0a515549540a";
    private const string V4 = "0a000001c0a80102c35401bb"; // 10.0.0.1:50004 -> 192.168.1.2:443
    private static readonly string V6 = $"20010db8{new string('0', 23)}1{new string('0', 31)}1c35401bb";

    // ---- PROXY, version 1

    [Theory]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 50004 443\r\n", "10.0.0.1:50004", "192.168.1.2:443")]
    [InlineData("PROXY TCP4 255.255.255.255 0.0.0.0 65535 0\r\n", "255.255.255.255:65535", "0.0.0.0:0")]
    [InlineData("PROXY TCP6 2001:db8::1 ::1 50004 443\r\n", "[2001:db8::1]:50004", "[::1]:443")]
    [InlineData("PROXY TCP6 2001:0DB8:0:0:0:0:0:1 ::1 1 2\r\n", "[2001:db8::1]:1", "[::1]:2")]
    [InlineData("PROXY TCP6 ::ffff:10.0.0.1 ::ffff:10.0.0.2 1 2\r\n", "10.0.0.1:1", "10.0.0.2:2")]
    [InlineData("PROXY UNKNOWN\r\n", "-", "-")]
    [InlineData("PROXY UNKNOWN anything at all 1 2 3\r\n", "-", "-")]
    public void A_header_of_version_1_is_taken_when_it_is_whole(string header, string source, string destination) =>
        Taken(Ascii(header), source, destination);

    [Fact]
    public void The_longest_header_of_version_1_has_107_bytes()
    {
        const string All = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        Taken(Ascii($"PROXY TCP6 {All} {All} 65535 65535\r\n"), $"[{All}]:65535", $"[{All}]:65535");
        Taken(Ascii($"PROXY UNKNOWN {new string('x', 91)}\r\n"), "-", "-");
        Assert.Contains("longer than 107", Wrong(Ascii($"PROXY UNKNOWN {new string('x', 92)}\r\n")), StringComparison.Ordinal);
        Assert.Contains("longer than 107", Wrong(Ascii("PROXY " + new string('x', 101))), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 50004 443\n", "CR LF")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 50004 443\rX", "CR LF")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 50004\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 50004 443 \r\n", "malformed")]
    [InlineData("PROXY TCP4  10.0.0.1 192.168.1.2 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 010.0.0.1 192.168.1.2 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.1 192.168.1.2 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 0xa000001 192.168.1.2 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 ::1 ::1 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP6 10.0.0.1 192.168.1.2 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP6 fe80::1%1 ::1 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP6 [::1] ::1 50004 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 050004 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 65536 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 -1 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.2 01 443\r\n", "malformed")]
    [InlineData("PROXY TCP4 10.0.0.1 192.168.1.\u0661 1 443\r\n", "malformed")]
    [InlineData("PROXY UDP4 10.0.0.1 192.168.1.2 1 443\r\n", "malformed")]
    [InlineData("PROXY UNKNOWNS\r\n", "malformed")]
    [InlineData("PROXY \r\n", "malformed")]
    [InlineData("PROXY\r\n", "no PROXY header")]
    [InlineData("proxy TCP4 10.0.0.1 192.168.1.2 1 443\r\n", "no PROXY header")]
    [InlineData("G", "no PROXY header")]
    public void A_header_of_version_1_that_is_wrong_is_refused_with_the_reason(string header, string reason) =>
        Assert.Contains(reason, Wrong(Encoding.UTF8.GetBytes(header)), StringComparison.Ordinal);

    // ---- PROXY, version 2

    [Fact]
    public void A_header_of_version_2_is_taken_when_it_is_whole()
    {
        Taken(V2("2111", V4), "10.0.0.1:50004", "192.168.1.2:443");
        Taken(V2("2121", V6), "[2001:db8::1]:50004", "[::1]:443");
        Taken(V2("2111", V4 + "040003616263" + "200000"), "10.0.0.1:50004", "192.168.1.2:443"); // TLVs
        Taken(V2("2131", Path("/run/client") + Path("/run/server")), "unix:/run/client", "unix:/run/server");
        Taken(V2("2131", Path("") + Path("/run/server")), "-", "unix:/run/server");
        Taken(V2("2100", ""), "-", "-");
        Taken(V2("2100", "040000"), "-", "-");
        Taken(V2("2112", V4), "-", "-"); // a datagram: its addresses are not those of a connection
        Taken(V2("2000", ""), "-", "-");
        Taken(V2("2011", V4 + "ffff"), "-", "-"); // LOCAL: what follows is of no meaning
    }

    [Fact]
    public void A_path_may_fill_its_place_or_be_of_any_bytes()
    {
        string full = string.Concat(Enumerable.Repeat("61", 108));
        Taken(V2("2131", full + full), "-", "-"); // too long to be said
        Taken(V2("2131", "ff" + new string('0', 214) + Path("/x")), "unix:\ufffd", "unix:/x");
        Taken(V2("2131", "0061" + new string('0', 212) + Path("/x")), "unix:@a", "unix:/x");
    }

    [Fact]
    public void A_header_of_version_2_that_is_wrong_is_refused_with_the_reason()
    {
        Reason("version or command", V2("1111", V4));
        Reason("version or command", V2("2211", V4));
        Reason("version or command", V2("3111", V4));
        Reason("address family", V2("2141", V4));
        Reason("address family", V2("2113", V4));
        Reason("shorter than its addresses", V2("2111", V4[..^2]));
        Reason("shorter than its addresses", V2("2121", V6[..^2]));
        Reason("shorter than its addresses", V2("2131", V6));
        Reason("cut extension", V2("2111", V4 + "04"));
        Reason("cut extension", V2("2111", V4 + "0400"));
        Reason("cut extension", V2("2111", V4 + "04000361"));
        Reason("longer than 4096", Hex(Signature + "21110ff1")); // known from the length: nobody waits for the rest
        Reason("longer than 4096", Hex(Signature + "2000ffff"));
        byte[] longest = [.. Hex(Signature + "21110ff0" + V4 + "040fe1"), .. new byte[4065]];
        Assert.Equal(4096, longest.Length);
        Taken(longest, "10.0.0.1:50004", "192.168.1.2:443");

        static void Reason(string reason, byte[] header) =>
            Assert.Contains(reason, Wrong(header), StringComparison.Ordinal);
    }

    [Fact]
    public void A_checksum_must_be_right()
    {
        byte[] header = V2("2111", V4 + "040001aa" + "03000400000000" + "040001bb");
        Assert.Contains("checksum", Wrong(header), StringComparison.Ordinal);
        uint crc = Crc32C(header);
        int at = 16 + 12 + 4 + 3;
        byte[] sum = [(byte)(crc >> 24), (byte)(crc >> 16), (byte)(crc >> 8), (byte)crc];
        sum.CopyTo(header, at);
        Taken(header, "10.0.0.1:50004", "192.168.1.2:443");
        header[17] ^= 1; // the client's address
        Assert.Contains("checksum", Wrong(header), StringComparison.Ordinal);
        Assert.Contains("checksum", Wrong(V2("2111", V4 + "030003000000")), StringComparison.Ordinal);
        Assert.Equal(0xe3069283, Crc32C(Ascii("123456789"))); // RFC 3720, B.4 and others

        static uint Crc32C(byte[] bytes)
        {
            uint crc = uint.MaxValue;
            foreach (byte b in bytes)
            {
                crc ^= b;
                for (int bit = 0; bit < 8; bit++)
                {
                    crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82f63b78 : crc >> 1;
                }
            }

            return ~crc;
        }
    }

    // ---- PROXY, written

    [Theory]
    [InlineData("10.0.0.1:1", "10.0.0.2:2", "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "10.0.0.1:1", "10.0.0.2:2")]
    [InlineData("[::ffff:10.0.0.1]:1", "10.0.0.2:2", "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "10.0.0.1:1", "10.0.0.2:2")]
    [InlineData("[fe80::1%3]:1", "[::2]:2", "PROXY TCP6 fe80::1 ::2 1 2\r\n", "[fe80::1]:1", "[::2]:2")]
    [InlineData("10.0.0.1:1", "[::2]:2", "PROXY UNKNOWN\r\n", "10.0.0.1:1", "[::2]:2")]
    [InlineData("unix:/a", "unix:/b", "PROXY UNKNOWN\r\n", "unix:/a", "unix:/b")]
    [InlineData("unix:@a", "unix:/b", "PROXY UNKNOWN\r\n", "unix:@a", "unix:/b")]
    [InlineData("unix:/a", "10.0.0.1:1", "PROXY UNKNOWN\r\n", "-", "-")]
    public void What_is_written_can_be_read(string source, string destination, string v1, string source2, string destination2)
    {
        byte[] header = new byte[ProxyHeader.LongestWritten];
        int length = ProxyHeader.Write(header, ProxyVersion.V1, EndPointOf(source), EndPointOf(destination));
        Assert.Equal(v1, Encoding.ASCII.GetString(header, 0, length));
        length = ProxyHeader.Write(header, ProxyVersion.V2, EndPointOf(source), EndPointOf(destination));
        Assert.Equal(0x21, header[12]);
        Taken(header[..length], source2, destination2);
    }

    [Fact]
    public void A_header_without_addresses_speaks_for_nobody()
    {
        byte[] header = new byte[ProxyHeader.LongestWritten];
        Assert.Equal("PROXY UNKNOWN\r\n", Encoding.ASCII.GetString(
            header, 0, ProxyHeader.Write(header, ProxyVersion.V1, null, null)));
        int length = ProxyHeader.Write(header, ProxyVersion.V2, null, null);
        Assert.Equal(Hex(Signature + "20000000"), header[..length]);
    }

    // ---- TLS

    [Fact]
    public void The_name_in_a_hello_is_found()
    {
        Named("www.example.com", Hello.OpenSsl);
        Named(null, Hello.OpenSslWithoutName);
        Named("a.example", Hello.Make("A.Example"));
        Named("xn--bcher-kva.example", Hello.Make("xn--bcher-kva.example"));
        Named("pq.example", Hello.Make("pq.example", keyShare: 1216)); // X25519MLKEM768
        Named("pq.example", Hello.Make("pq.example", keyShare: 1800));
        Named("big.example", Hello.Make("big.example", keyShare: 16_000));
        Named("big.example", Hello.Make("big.example", keyShare: 20_000)); // two records
        Named(null, Hello.Make(null));
        byte[] bare = [1, 0, 0, 38 + 2, 3, 1, .. new byte[32], 0, 0, 2, 0, 47, 1, 0]; // no extensions at all
        bare[3] = (byte)(bare.Length - 4);
        Named(null, Hello.Records(bare, 100));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(5)]
    [InlineData(100)]
    [InlineData(1400)]
    public void A_hello_may_be_spread_over_any_number_of_records(int size)
    {
        Named("www.example.com", Hello.Records(Hello.OpenSsl[5..], size));
        Named("pq.example", Hello.Make("pq.example", 1800, size));
    }

    [Theory]
    [InlineData("47", "no TLS hello")] // G
    [InlineData("80", "no TLS hello")] // the hello of SSL 2
    [InlineData("1602", "no TLS hello")]
    [InlineData("1603010000", "no TLS hello")]
    [InlineData("1603014001", "no TLS hello")]
    [InlineData("160301000102", "no TLS hello")] // a ServerHello
    [InlineData("16030100010115", "no TLS hello")] // an alert in between
    [InlineData("160301000401000000", "malformed")]
    [InlineData("16030100040100002216030100220203" + "0000000000000000000000000000000000000000000000000000000000000000", "malformed")]
    public void What_is_no_hello_is_known_at_the_first_byte_that_says_so(string hex, string reason)
    {
        byte[] bytes = Hex(hex);
        for (int i = 0; i <= bytes.Length; i++)
        {
            Assert.Equal(0, ServerName.Parse(bytes.AsSpan(0, i), out string? name, out string? wrong));
            Assert.Null(name);
            Assert.Equal(i == bytes.Length, wrong is not null);
            Assert.Contains(i == bytes.Length ? reason : "", wrong ?? "", StringComparison.Ordinal);
        }
    }

    [Theory]
    [InlineData("")]
    [InlineData(".example")]
    [InlineData("example.")]
    [InlineData("a..example")]
    [InlineData("a b")]
    [InlineData("a\nb")]
    [InlineData("a/b")]
    [InlineData("*.example")]
    [InlineData("caf\u00e9.example")]
    public void A_name_that_is_none_is_refused(string name)
    {
        byte[] hello = Hello.Records(Hello.Message(Encoding.UTF8.GetBytes(name)), 16384);
        Assert.Equal(0, ServerName.Parse(hello, out string? found, out string? wrong));
        Assert.Equal((null, "a malformed TLS hello"), (found, wrong));
    }

    [Theory]
    [InlineData("0000")] // an empty list
    [InlineData("000401000178")] // of another type
    [InlineData("0005000003787878")] // cut
    public void A_list_of_names_is_one_host_name(string list)
    {
        byte[] hello = Hello.Records(Hello.Message("x"u8.ToArray(), list: Hex(list)), 16384);
        Assert.Equal(0, ServerName.Parse(hello, out string? name, out string? wrong));
        Assert.Equal((null, "a malformed TLS hello"), (name, wrong));
        hello = Hello.Records(Hello.Message("x"u8.ToArray(), list: [0, 4, 0, 0, 1, (byte)'y']), 16384);
        Assert.NotEqual(0, ServerName.Parse(hello, out name, out wrong));
        Assert.Equal(("y", null), (name, wrong));
    }

    [Fact]
    public void Every_length_in_a_hello_is_checked()
    {
        byte[] hello = Hello.Make("www.example.com");
        int malformed = 0;
        for (int i = 5; i < hello.Length; i++)
        {
            byte kept = hello[i];
            hello[i] = 0xff;
            _ = ServerName.Parse(hello, out _, out string? wrong);
            malformed += wrong is not null ? 1 : 0;
            hello[i] = kept;
        }

        Assert.InRange(malformed, 15, hello.Length);
    }

    // ---- groups of names

    [Fact]
    public void An_exact_name_wins_over_a_wildcard_and_a_longer_over_a_shorter()
    {
        Settings settings = CommandLine.Parse(
        [
            "-l", "1", "-u", "a:1", "--sni", "www.example.com,example.org", "-u", "b:1",
            "--sni", "*.example.com", "-u", "c:1", "-u", "d:1", "--sni", "*.EU.example.com", "-u", "e:1",
            "--sni", "www.example.com,example.org", "-u", "f:1",
        ]);
        Assert.Equal(
            ["", "www.example.com,example.org", "*.example.com", "*.example.com", "*.eu.example.com", "www.example.com,example.org"],
            settings.Routes[0].Upstreams.Select(upstream => string.Join(',', upstream.ServerNames ?? [])));
        Route route = new(settings.Routes[0], new ConnectionLimit(0, null), new Log(new LogSettings()));
        Assert.True(route.NeedsName);
        UpstreamPool[] pools =
        [
            route.PoolOf(null)!, route.PoolOf("www.example.com")!, route.PoolOf("a.example.com")!, route.PoolOf("a.eu.example.com")!,
        ];
        Assert.Equal(4, pools.Distinct().Count());
        (string Name, int Pool)[] expected =
        [
            ("example.org", 1), ("example.com", 0), ("x.other.example.com", 2), ("x.y.eu.example.com", 3),
            ("eu.example.com", 2), ("wwwexample.com", 0), ("a.www.example.com", 2), ("a.example.org", 0), ("com", 0),
        ];
        Assert.All(expected, pair => Assert.Same(pools[pair.Pool], route.PoolOf(pair.Name)));
    }

    [Fact]
    public void Without_a_fallback_other_names_have_no_server()
    {
        Settings settings = CommandLine.Parse(["-l", "1", "--sni", "a.example", "-u", "a:1"]);
        Route route = new(settings.Routes[0], new ConnectionLimit(0, null), new Log(new LogSettings()));
        Assert.Null(route.PoolOf(null));
        Assert.Null(route.PoolOf("b.example"));
        Assert.NotNull(route.PoolOf("a.example"));
    }

    [Theory]
    [InlineData("-l 1 -u a:1 --sni b.example", "no upstream follows")]
    [InlineData("-l 1 -u a:1 --sni a.example -u b:1 --sni a.example,b.example -u c:1", "a.example stands in two groups")]
    [InlineData("-l 1 --sni a/b -u b:1", "'a/b' is not a server name")]
    [InlineData("-l 1 --sni a,,b -u b:1", "'' is not a server name")]
    [InlineData("-l 1 --sni * -u b:1", "'*' is not a server name")]
    [InlineData("-l 1 --sni *.*.b -u b:1", "'*.*.b' is not a server name")]
    [InlineData("-l 1 --sni a.*.b -u b:1", "'a.*.b' is not a server name")]
    [InlineData("1 a:1 --sni a.example", "no upstream follows")]
    [InlineData("1 a:1 --send-proxy v3", "unknown version 'v3'")]
    [InlineData("1 a:1 --accept-proxy 10.0.0.1/8", "did you mean '10.0.0.0/8'?")]
    [InlineData("1 a:1 --accept-proxy 10.0.0.0/33", "'33' is not between 0 and 32")]
    [InlineData("1 a:1 --accept-proxy 10.0.0.0/x", "'x' is not a number")]
    [InlineData("1 a:1 --accept-proxy 10.1/16", "'10.1/16' is not a network")]
    [InlineData("1 a:1 --accept-proxy all", "'all' is not a network")]
    [InlineData("1 a:1 --accept-proxy 10.0.0.1,", "'' is not a network")]
    [InlineData("1 a:1 --accept-proxy 2001:db8::1/32", "did you mean '2001:db8::/32'?")]
    [InlineData("1 a:1 --accept-proxy 10.0.0.0/-1", "'-1' is not a number")]
    [InlineData("1 a:1 --accept-proxy ::1/129", "'129' is not between 0 and 128")]
    public void A_mistake_is_named(string words, string message) => Assert.Contains(
        message, Assert.Throws<FormatException>(() => CommandLine.Parse(words.Split(' '))).Message, StringComparison.Ordinal);

    [Fact]
    public void Senders_are_those_of_the_networks()
    {
        PrereadSettings settings = new();
        settings.AcceptProxy("10.0.0.0/8,192.168.1.5,2001:db8::/32");
        Assert.True(settings.HasSenders);
        Assert.True(settings.IsSender(IPEndPoint.Parse("10.255.0.1:1")));
        Assert.True(settings.IsSender(IPEndPoint.Parse("[::ffff:10.255.0.1]:1")));
        Assert.True(settings.IsSender(IPEndPoint.Parse("192.168.1.5:1")));
        Assert.True(settings.IsSender(IPEndPoint.Parse("[2001:db8:1::]:1")));
        Assert.False(settings.IsSender(IPEndPoint.Parse("11.0.0.1:1")));
        PrereadSettings mapped = new();
        mapped.AcceptProxy("::ffff:10.0.0.0/104");
        Assert.True(mapped.IsSender(IPEndPoint.Parse("10.255.0.1:1")));
        Assert.False(mapped.IsSender(IPEndPoint.Parse("11.0.0.1:1")));
        Assert.False(settings.IsSender(IPEndPoint.Parse("192.168.1.6:1")));
        Assert.False(settings.IsSender(IPEndPoint.Parse("[2001:db9::]:1")));
        Assert.False(settings.IsSender(new UnixDomainSocketEndPoint("/x")));
        settings.AcceptProxy("unix,::/0");
        Assert.True(settings.IsSender(new UnixDomainSocketEndPoint("/x")));
        Assert.True(settings.IsSender(IPEndPoint.Parse("[2001:db9::]:1")));
        Assert.False(settings.IsSender(IPEndPoint.Parse("[::ffff:10.0.0.1]:1")));
        settings.AcceptProxy("off");
        Assert.False(settings.HasSenders);
    }

    [Fact]
    public void A_route_that_asks_for_nothing_reads_nothing()
    {
        Assert.True(IsPlain("1 a:1"));
        Assert.True(IsPlain("1 a:1 --send-proxy off --accept-proxy off --preread-timeout 1s"));
        Assert.False(IsPlain("1 a:1 --send-proxy v1"));
        Assert.False(IsPlain("1 a:1 --accept-proxy 10.0.0.1"));
        Assert.False(IsPlain("-l 1 --sni a -u a:1"));

        static bool IsPlain(string words) => new Route(
            CommandLine.Parse(words.Split(' ')).Routes[0], new ConnectionLimit(0, null), new Log(new LogSettings())).IsPlain;
    }

    // ---- what the tests say

    /// <summary>Taken when whole, wanted more of when not, with any bytes behind it.</summary>
    private static void Taken(byte[] header, string source, string destination)
    {
        for (int i = 0; i < header.Length; i++)
        {
            Assert.Equal(0, ProxyHeader.Parse(header.AsSpan(0, i), out _, out _, out string? wrong));
            Assert.Null(wrong);
        }

        foreach (byte[] rest in new byte[][] { [], [0], Ascii("PROXY UNKNOWN\r\n"), new byte[5000] })
        {
            int taken = ProxyHeader.Parse((byte[])[.. header, .. rest], out EndPoint? from, out EndPoint? to, out string? wrong);
            Assert.Equal((null, header.Length), (wrong, taken));
            Assert.Equal((source, destination), (Text.Of(from), Text.Of(to)));
        }
    }

    private static string Wrong(byte[] header)
    {
        Assert.Equal(0, ProxyHeader.Parse(header, out EndPoint? source, out EndPoint? destination, out string? wrong));
        Assert.Equal((null, null), (source, destination));
        return wrong ?? "nothing is wrong";
    }

    private static void Named(string? expected, byte[] hello)
    {
        for (int i = 0; i < hello.Length; i += hello.Length > 3000 ? 37 : 1)
        {
            Assert.Equal(0, ServerName.Parse(hello.AsSpan(0, i), out string? name, out string? wrong));
            Assert.Equal((null, null), (name, wrong));
        }

        foreach (byte[] rest in new byte[][] { [], [0], [22, 3, 3, 0, 1, 1], new byte[1000] })
        {
            Assert.True(ServerName.Parse((byte[])[.. hello, .. rest], out string? name, out string? wrong) > 0, wrong);
            Assert.Equal(expected, name);
        }
    }

    private static byte[] V2(string versionAndFamily, string rest) =>
        Hex(Signature + versionAndFamily + (rest.Length / 2).ToString("x4", null) + rest);

    private static string Path(string path) => Convert.ToHexString(Encoding.UTF8.GetBytes(path.PadRight(108, '\0')));

    private static EndPoint EndPointOf(string text) =>
        !text.StartsWith("unix:", StringComparison.Ordinal) ? IPEndPoint.Parse(text)
        : new UnixDomainSocketEndPoint(text["unix:".Length..].Replace('@', '\0'));

    private static byte[] Ascii(string text) => Encoding.ASCII.GetBytes(text);

    private static byte[] Hex(string text) => Convert.FromHexString(text);
}
